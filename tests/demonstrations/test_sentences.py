"""Sentences out of files, and samples of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.demonstrations.sentences import read_sentences, sample
from llmemb_ray.errors import ConfigError, InputError, LlmembError

TEXTS = ["A man is playing.", 'She said "yes, now".', "A man  is\tplaying.", "", "数据。"]
EXPECTED = ["A man is playing.", 'She said "yes, now".', "数据。"]


def write(path: Path, texts: list[Any], column: str = "sentence") -> str:
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), column: texts}), path)
    elif path.suffix == ".csv":
        path.write_text(f"id,{column}\n" + "".join('1,"' + text.replace('"', '""') + '"\n' for text in texts))
    else:
        path.write_text(f"id\t{column}\n" + "".join(f"1\t{' '.join(text.split())}\n" for text in texts))
    return str(path)


def test_a_column_that_parquet_encodes_as_a_dictionary_is_read(tmp_path: Path) -> None:
    table = pa.table({"sentence": pa.array([*TEXTS, None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "s.parquet")
    assert pa.types.is_dictionary(pq.read_schema(tmp_path / "s.parquet").field("sentence").type)
    read = read_sentences(str(tmp_path / "s.parquet"))
    assert (read.sentences, read.empty) == (EXPECTED, 2)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "csv", "tsv"])
def test_every_kind_of_file_gives_its_distinct_sentences(tmp_path: Path, kind: str) -> None:
    read = read_sentences(write(tmp_path / f"s.{kind}", TEXTS))
    assert read.sentences == EXPECTED
    assert read.source == f"s.{kind}"


def test_the_paper_s_sentences_stand_in_stsb_train(data: Path) -> None:
    """Paper 1 took them from there; shared data say of 99 which they are."""
    records = [json.loads(line) for line in (data / "icl_demos" / "demos.jsonl").read_text().splitlines()]
    paper = {record["sentence"] for record in records if record["source"] == "stsb_train"}
    read = read_sentences("stsb-train", data=str(data))
    assert len(paper - set(read.sentences)) == 0
    lines = (data / "sts_raw" / "STSBenchmark" / "sts-train.csv").read_text().rstrip("\n").split("\n")
    assert len(lines) == 5749
    assert set(read.sentences) == {" ".join(text.split()) for line in lines for text in line.split("\t")[5:7]}
    lowered = read_sentences("stsb-train-senteval", data=str(data)).sentences
    assert lowered[0] == "a plane is taking off ."


@pytest.mark.parametrize(
    ("name", "text", "column", "said"),
    [
        ("s.jsonl", '{"a": 1}\n', None, "sentence_column: .* no column sentence or text; name one of a"),
        ("s.jsonl", '{"sentence": "x"}\n', "b", "has no column 'b'"),
        ("s.jsonl", '{"sentence": "x"}\n{"sentence": 3}\n', None, "line 2: '3' is no text"),
        ("s.jsonl", '{"sentence": "x"}\n{"sentence"\n', None, "line 2 is not JSON"),
        ("s.csv", "sentence,a\nx,1\ny\n", None, "line 3 has 1 columns, the header 2"),
        ("s.csv", 'sentence\n"x\n', None, "is not CSV"),
        ("s.txt", "x\n", "a", "plain text"),
        ("s.txt", "\n", None, "holds none"),
        ("s.parquet", "no Parquet", None, "cannot be read as Parquet"),
        ("s.doc", "x", None, "of no kind"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, column: str | None, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LlmembError, match=said):
        read_sentences(str(tmp_path / name), column=column)


def test_a_column_of_numbers_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column sentence of .* holds int64"):
        read_sentences(write(tmp_path / "s.parquet", [1, 2]))
    pq.write_table(pa.table({"text": pa.array([1, 2]).dictionary_encode()}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"column text of .* holds int64"):
        read_sentences(str(tmp_path / "d.parquet"))
    with pytest.raises(InputError, match=r"sts-train\.csv"):
        read_sentences("stsb-train", data=str(tmp_path))
    (tmp_path / "STSBenchmark").mkdir()
    (tmp_path / "STSBenchmark" / "sts-train.csv").write_text("main\tMSRvid\n")
    with pytest.raises(InputError, match=r"sts-train\.csv line 1 has 2 columns"):
        read_sentences("stsb-train", data=str(tmp_path))
    with pytest.raises(ConfigError, match="of no kind"):
        read_sentences("stsb-test")


def test_a_sample_follows_from_the_seed_keeps_the_order_and_grows() -> None:
    items = list(range(1000))
    small, large = sample(items, 20, 7), sample(items, 50, 7)
    assert small == sorted(small)
    assert len(set(small)) == 20
    assert set(small) < set(large)
    assert sample(items, 20, 8) != small
    assert sample(items, 5000, 7) == items
