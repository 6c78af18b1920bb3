"""What is taken of a training's files: columns, rows, rejects, public sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from llmemb_ray.config.training import FinetuneSettings
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.storage import Storage
from llmemb_ray.training import public_sets, reading, sources
from llmemb_ray.training.sources import Bad, Columns, Row

REPRODUCE = Path(__file__).parents[2] / "jobs" / "reproduce" / "training"


def settings(*train: Any, **values: Any) -> FinetuneSettings:
    return FinetuneSettings.make({"model": "m", "out": "o", "train": list(train)} | values)


def origin(**values: Any) -> sources.Origin:
    return sources.settle(settings({"path": "rows.csv"} | values))[0]


def columns(**values: Any) -> Columns:
    fields: dict[str, Any] = {"anchor": "a", "positive": "p", "negatives": ("n",), "teacher": None, "scores": (), "instruction": None}
    return Columns(**fields | values)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["hard_neg", "sent1", "sent0"], ("sent0", "sent1", ("hard_neg",))),
        (["query", "pos", "neg"], ("query", "pos", ("neg",))),
        (["anchor", "positive", "negative_10", "negative_2", "negative"], ("anchor", "positive", ("negative", "negative_2", "negative_10"))),
        (["question", "positive"], ("question", "positive", ())),
    ],
)
def test_common_names_of_columns_are_known(names: list[str], taken: tuple[Any, ...]) -> None:
    found = sources.columns(origin(), names, "rows.csv", "none")
    assert (found.anchor, found.positive, found.negatives) == taken


def test_columns_that_are_named_win_and_a_missing_one_is_refused_with_file_and_setting() -> None:
    found = sources.columns(origin(anchor_column="x", positive_column="y", negative_column=["z"]), ["anchor", "positive", "x", "y", "z"], "f", "none")
    assert (found.anchor, found.positive, found.negatives) == ("x", "y", ("z",))
    with pytest.raises(ConfigError, match=r"train\[0\]\.negative_column: f\.csv has no column 'z'; its columns are anchor, positive"):
        sources.columns(origin(negative_column=["z"]), ["anchor", "positive"], "f.csv", "none")
    with pytest.raises(ConfigError, match=r"train\[0\]\.positive_column: f\.csv has no column positive or .*; name one of its columns, anchor, answer"):
        sources.columns(origin(), ["anchor", "answer"], "f.csv", "none")
    assert sources.columns(origin(), ["text", "teacher"], "f", "vectors").positive is None
    assert sources.columns(origin(), ["anchor", "positive", "positive_score", "negative_scores"], "f", "scores").scores == ("positive_score", "negative_scores")


@pytest.mark.parametrize(
    ("values", "changes", "column", "reason"),
    [
        ({"a": None, "p": "x"}, {}, "a", "null"),
        ({"a": " \t", "p": "x"}, {}, "a", "empty"),
        ({"a": 7, "p": "x"}, {}, "a", "not text"),
        ({"a": "x"}, {}, "p", "null"),
        ({"a": "x", "p": "y\ud800"}, {}, "p", "not valid Unicode"),
        ({"a": "x", "p": []}, {}, "p", "no positive"),
        ({"a": "x", "p": ["y", ""]}, {}, "p", "empty"),
        ({"a": "x", "p": "y", "n": ["z", " "]}, {}, "n", "empty"),
        ({"a": "x", "p": "y", "n": ["z", " x"]}, {}, "n", "negative equals anchor"),
        ({"a": "x", "p": "y", "n": ["y", "y "]}, {}, "n", "negative equals positive"),
        ({"a": "x", "p": "y", "t": [1.0, 2.0]}, {"teacher": "t"}, "t", "teacher vector malformed"),
        ({"a": "x", "p": "y", "t": "1 2 3"}, {"teacher": "t"}, "t", "teacher vector malformed"),
        ({"a": "x", "p": "y", "t": [1.0, float("nan"), 2.0]}, {"teacher": "t"}, "t", "teacher vector not finite"),
        ({"a": "x", "p": "y"}, {"teacher": "t"}, "t", "null"),
        ({"a": "x", "p": "y", "n": "z", "s": [1.0]}, {"scores": ("s",)}, "s", "scores of a wrong count"),
        ({"a": "x", "p": "y", "n": "z", "s": ["1", "2"]}, {"scores": ("s",)}, "s", "scores malformed"),
        ({"a": "x", "p": "y", "instruction": 3}, {"instruction": "instruction"}, "instruction", "not text"),
        ({"a": "x", "p": "y", "task": "\udfff"}, {"instruction": "task"}, "task", "not valid Unicode"),
    ],
)
def test_a_row_that_cannot_be_trained_on_says_why(values: dict[str, Any], changes: dict[str, Any], column: str, reason: str) -> None:
    found = sources.check(values, columns(**changes), teacher_length=3)
    assert isinstance(found, Bad)
    assert (found.column, found.reason) == (column, reason)


def test_rows_that_can() -> None:
    def row(values: dict[str, Any], *, blanks: bool = False, **changes: Any) -> Row:
        found = sources.check({"a": "x"} | values, columns(**changes), blanks=blanks)
        assert isinstance(found, Row)
        return found

    assert row({"p": "x", "n": None}).positives == ["x"], "an anchor may equal its positive"
    assert row({"p": "y", "n": ""}, blanks=True).negatives == [], "CSV has no other way to say that there is none"
    assert row({"p": ["y", {"title": "T", "text": "u"}], "n": [{"title": "", "text": "v"}]}) == Row(
        anchor="x", positives=["y", "T u"], negatives=["v"], teacher=None, scores=None, instruction=None
    )
    dropped = row({"p": "y", "n": ["z", "y", "w"], "s": [0.9, 0.5, 0.8, 0.1]}, scores=("s",))
    assert (dropped.negatives, dropped.scores) == (["z", "w"], [0.9, 0.5, 0.1]), "the score goes with the negative"
    assert row({"p": None, "t": [1, 2]}, teacher="t").positives == []
    assert [row({"p": "y", "task": task}, instruction="task").instruction for task in (3, ["i"], " ", "i")] == [None, None, None, "i"]


def read(path: Path, rows: list[dict[str, Any]], **values: Any) -> tuple[reading.FileRows, list[dict[str, Any]], list[tuple[int, str, str]]]:
    """What is told of a file of JSON lines, its rows, and (row, column, reason) of its rejects."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"number": 0, "source": 0, "hard_negatives": 1, "mix_tasks": False, "keep_anchors": True, "distill": "none"}
    asked = settings({"path": str(path)})
    task = reading.FileTask(origin=sources.settle(asked)[0], url=str(path), access=asked.access, **options | values)
    made = reading.read_file(task, Storage(str(path.parent / "out")))
    rejects = [row for file in sorted(path.parent.glob("out/data/rejects/*")) for row in pq.read_table(file).to_pylist()]
    kept = [row for name, _ in made.parts for row in pq.read_table(path.parent / "out" / name).to_pylist()]
    return made, kept, [(row["row"], row["column"], row["reason"]) for row in rejects]


def test_rows_of_json_lines_may_differ_in_their_columns(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [
        {"anchor": "a", "positive": "p"},
        {"anchor": "b", "positive": "p", "negative_1": "n"},
        {"positive": "p", "hard_neg": ["m", "o"], "instruction": "i", "anchor": "c"},
        {"query": "no anchor", "positive": "p"},
        {"anchor": "\ud800", "positive": "p"},
        {"anchor": " A", "positive": "p", "task": 3},
    ]
    made, rows, rejects = read(tmp_path / "rows.jsonl", given)
    assert [(row["anchor"], row["negatives"], row["instruction"]) for row in rows] == [
        ("a", [], None),
        ("b", ["n"], None),
        ("c", ["m", "o"], "i"),
        (" A", [], None),
    ]
    assert rejects == [(3, "anchor", "null"), (4, "anchor", "not valid Unicode")]
    assert (made.anchors == made.anchors[0]).tolist() == [True, False, False, True]


def test_a_column_that_the_first_rows_have_nowhere_is_refused(tmp_path: Path) -> None:
    lacking: list[dict[str, Any]] = [{"anchor": "a"}] * 99
    whole: dict[str, Any] = {"anchor": "a", "positive": "p"}
    made, _, _ = read(tmp_path / "rows.jsonl", [*lacking, whole])
    assert (made.read, made.reasons) == (100, {"null": 99})
    with pytest.raises(ConfigError, match=r"train\[0\]\.positive_column: .*rows\.jsonl has no column positive or"):
        read(tmp_path / "rows.jsonl", [*lacking, *lacking[:1], whole])


def test_most_rows_being_rejects_stops_with_an_example() -> None:
    sources.require_majority(origin(), 10, {"empty": 5}, {"empty": ""})
    with pytest.raises(InputError, match=r"train\[0\] \(rows\): 6 of 10 rows cannot be trained on, 5 of them for 'empty': file f row 3: column 'a'"):
        sources.require_majority(origin(), 10, {"null": 1, "empty": 5}, {"null": "", "empty": "file f row 3: column 'a'"})


def test_a_public_set_says_what_a_source_leaves_open() -> None:
    told = origin(dataset="nli")
    assert (told.name, told.weight, told.symmetric) == ("nli", 1.0, True)
    assert told.instructions == ("Given a premise, retrieve a hypothesis that is entailed by the premise", "Retrieve semantically similar text")
    assert sources.columns(told, ["anchor", "sent0", "sent1", "hard_neg"], "f", "none").anchor == "sent0"
    given = origin(dataset="msmarco-passage", weight=0.25, instruction=["Mine"], symmetric=True, name="own")
    assert (given.name, given.weight, given.symmetric, given.instructions) == ("own", 0.25, True, ("Mine",))
    with pytest.raises(ConfigError, match="'nil' is no public set of paper 2; those are eli5, "):
        origin(dataset="nil")


def test_the_papers_mixtures_are_configurations() -> None:
    shares = {"eli5": 0.1, "quora": 0.1, "msmarco-passage": 0.5, "msmarco-document": 0.2, "t2ranking": 0.5}
    assert {name: one.share for name, one in public_sets.table().items() if one.share != 1} == shares
    made = {path.stem: FinetuneSettings.make(yaml.safe_load(path.read_text())) for path in REPRODUCE.glob("paper?-*.yaml")}
    sets = {name: {source.dataset or source.name for source in one.train} for name, one in made.items()}
    assert sets == {
        "paper1-nli": {"nli"},
        "paper2-synthetic": {"synthetic"},
        "paper2-synthetic-msmarco": {"synthetic", "msmarco-passage"},
        "paper2-full": {"synthetic", *public_sets.table()},
    }
    assert {(one.batch_size, one.temperature) for name, one in made.items() if name.startswith("paper2")} == {(2048, 0.02)}
    assert (made["paper1-nli"].batch_size, made["paper1-nli"].text_tokens, made["paper1-nli"].lora_rank) == (256, 32, 64)
