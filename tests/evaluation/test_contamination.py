"""Texts of an evaluation that stand in training files."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation.contamination import Contamination, check, from_dict
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server

TEXTS = {"one": ["A cat sat.", "a CAT  sat.", "A dog ran.", "Nothing."], "two": ["\tA  dog ran. ", "Straße", " "]}
"""Four texts of which three differ, and three of which two are texts."""


def found(contamination: Contamination) -> dict[str, tuple[int, int, int]]:
    return {name: (task.texts, task.distinct, task.found) for name, task in contamination.tasks.items()}


def by_column(contamination: Contamination) -> dict[str, tuple[int, int, int]]:
    return {column.column: (column.strings, column.matches, column.distinct) for column in contamination.columns}


def test_case_and_white_space_are_ignored_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("acatsat.\nA CAT\u00a0SAT.\n\nA cat sat\nSTRASSE\nno\nthing.\n", encoding="utf-8")
    result = check([str(tmp_path / "train.txt")], TEXTS)
    assert found(result) == {"one": (4, 3, 1), "two": (3, 2, 1)}
    assert by_column(result) == {"line": (6, 3, 2)}
    assert result.tasks["one"].examples == ["A cat sat."]
    assert result.tasks["two"].share == 0.5


def test_every_string_of_parquet_is_looked_at(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": [1, 2],
            "text": ["a cat sat.", None],
            "negatives": [["x", "A dog ran."], []],
            "pair": [{"left": "nothing.", "score": 1.0}, None],
            "kind": pa.array(["A cat sat.", "b"]).dictionary_encode(),
            "vector": pa.array([[0.5, 0.5]] * 2, pa.list_(pa.float32(), 2)),
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    result = check([str(tmp_path / "train.parquet")], TEXTS)
    assert found(result) == {"one": (4, 3, 3), "two": (3, 2, 1)}
    assert by_column(result) == {"text": (1, 1, 1), "negatives": (2, 1, 1), "pair.left": (1, 1, 1), "kind": (2, 1, 1)}


def test_other_forms(tmp_path: Path) -> None:
    rows = [{"query": "a cat sat.", "more": {"pos": ["a dog ran.", "y"]}}, ["nothing."], "Straße", 7, None]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows))
    assert by_column(check([str(tmp_path / "a.jsonl.gz")], TEXTS)) == {"query": (1, 1, 1), "more.pos": (2, 1, 1), "value": (2, 2, 2)}
    (tmp_path / "b.csv").write_text('sent0,sent1\n"A dog\n ran.",x\n"a, b",A CAT SAT.,nothing.\n', encoding="utf-8-sig")
    assert by_column(check([str(tmp_path / "b.csv")], TEXTS)) == {"sent0": (2, 1, 1), "sent1": (2, 1, 1), "column 3": (1, 1, 1)}
    (tmp_path / "c.tsv").write_text('left\tright\n"A cat sat.\tA cat sat.\n', encoding="utf-8")
    assert by_column(check([str(tmp_path / "c.tsv")], TEXTS)) == {"left": (1, 0, 0), "right": (1, 1, 1)}, "a quote is no quoting in TSV"


def test_directories_and_several_files_add_up(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name, line in (("a.txt", "a cat sat."), ("b.txt", "a dog ran."), ("_SUCCESS", "nothing.")):
        (tmp_path / "train" / name).write_text(line)
    (tmp_path / "c.txt").write_text("straße")
    result = check([str(tmp_path / "train"), str(tmp_path / "c.txt")], TEXTS)
    assert found(result) == {"one": (4, 3, 2), "two": (3, 2, 2)}
    assert [Path(column.file).name for column in result.columns] == ["a.txt", "b.txt", "c.txt"]


def test_on_object_storage(s3: S3Server) -> None:
    Storage(s3.url("train"), s3.access()).put("a.jsonl", b'{"text": "A DOG RAN."}\n')
    for named in ("train", "train/a.jsonl"):
        assert found(check([s3.url(named)], TEXTS, s3.access()))["two"] == (3, 2, 1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', "a.jsonl line 2 is not JSON"),
        ("a.parquet", b"nothing of the kind", "a.parquet cannot be read as Parquet"),
        ("a.txt", b"caf\xe9\n", "a.txt is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 1000, mtime=0)[:-20], "a.jsonl.gz ends too soon"),
        ("a.txt.gz", b"no gzip", "a.txt.gz is not what gzip wrote"),
    ],
    ids=["json", "parquet", "text", "cut short", "no gzip"],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        check([str(tmp_path / name)], TEXTS)


def test_a_missing_file_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt is not there"):
        check([str(tmp_path / "gone.txt")], TEXTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no file in"):
        check([str(tmp_path / "empty")], TEXTS)
    with pytest.raises(ConfigError, match="at least one"):
        check([], TEXTS)


def test_it_is_shown_and_kept(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat sat.\n")
    result = check([str(tmp_path / "train.txt")], TEXTS)
    kept = json.loads(json.dumps(result.to_dict()))
    assert kept["tasks"]["one"]["share"] == pytest.approx(1 / 3)
    assert from_dict(kept) == result
    shown = [line.split() for line in result.lines()]
    assert ["one", "4", "3", "1", "33.33%"] in shown
    assert ["train.txt", "line", "1", "1", "1"] in shown
    assert "one: 'A cat sat.'" in result.lines()


def test_snli_in_the_sts_tasks(data: Path) -> None:
    """By another way: characters joined one by one, both sides in memory."""
    from llmemb_ray.evaluation import sts
    from llmemb_ray.evaluation.data import DataPlace

    texts = {name: [text for pairs in sts.read(DataPlace(data), name).subsets.values() for text in pairs.left + pairs.right] for name in sts.TASKS}
    train = data / "snli" / "snli_dev_triples.csv"
    result = check([str(train)], texts)

    def bare(text: str) -> str:
        return "".join(character for character in text.lower() if not character.isspace())

    with train.open(newline="", encoding="utf-8") as file:
        known = {bare(value) for row in csv.DictReader(file) for value in row.values()}
    assert found(result) == {name: (len(of_task), len({*map(bare, of_task)}), len({*map(bare, of_task)} & known)) for name, of_task in texts.items()}
    assert sum(task.found for task in result.tasks.values()) == 85
    assert {column.strings for column in result.columns} == {2954}


def test_of_many_tasks_the_worst_are_shown(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n".join(f"text {number}" for number in range(100)))
    texts = {f"task {task}": [f"text {number}" for number in range(100 - task, 200 - task)] for task in range(40)}
    shown = check([str(tmp_path / "train.txt")], texts).lines()
    assert [line.split()[1] for line in shown if line.startswith("task ") and "%" in line] == [str(task) for task in range(39, 15, -1)]
    assert f"… and 16 more tasks with smaller shares, of which 15 have {sum(range(16))} texts found; all stand in the record" in shown
