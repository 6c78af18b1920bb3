"""Batches of a mixture: which rows a step takes, that Ray brings together just those, and what is told when it cannot be."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from llmemb_ray.config.training import FinetuneSettings
from llmemb_ray.errors import ConfigError, InputError, OutputError, RunMismatch
from llmemb_ray.storage import Storage
from llmemb_ray.training import gathering, order, prepare, reading, sources
from llmemb_ray.training.batches import Batch, Batches
from llmemb_ray.training.order import Group, Steps

ONE, TWO = Group(task="one", instructions=(), symmetric=False, negatives=1), Group(task="two", instructions=("x", "y"), symmetric=False, negatives=0)


def epoch(rows: list[Any], weights: list[float], group_of: Any, **values: Any) -> tuple[order.Steps, dict[int, tuple[int, int]]]:
    options: dict[str, Any] = {"batch_size": 4, "seed": 1, "epoch": 1} | values
    return order.epoch_steps(rows, weights, group_of, [ONE, TWO], **options)


def test_an_epoch_takes_each_row_once_and_a_batch_has_one_group() -> None:
    group_of = np.array([0] * 13 + [1] * 10, np.int32)
    rows = [np.arange(13), np.arange(13, 23)]
    steps, taken = epoch(rows, [1.0, 1.0], group_of)
    assert taken == {0: (13, 1), 1: (10, 2)}
    assert (len(steps), len(set(steps.rows.tolist()))) == (5, 20)
    for step in range(5):
        assert set(group_of[steps.rows[steps.starts[step] : steps.starts[step + 1]]]) == {steps.groups[step]}
        assert steps.instructions[step] in ((-1,) if steps.groups[step] == 0 else (0, 1))
    assert np.array_equal(epoch(rows, [1.0, 1.0], group_of)[0].rows, steps.rows)
    assert not np.array_equal(epoch(rows, [1.0, 1.0], group_of, epoch=2)[0].rows, steps.rows)
    assert not np.array_equal(epoch(rows, [1.0, 1.0], group_of, seed=2)[0].rows, steps.rows)


def test_a_weight_is_the_share_of_rows_that_an_epoch_takes() -> None:
    group_of = np.array([0] * 40 + [1] * 40, np.int32)
    steps, taken = epoch([np.arange(40), np.arange(40, 80)], [2.5, 0.1], group_of)
    assert taken == {0: (100, 0), 1: (4, 0)}
    counts = Counter(steps.rows[np.repeat(steps.groups, 4) == 0].tolist())
    assert sorted(counts.values()) == [2] * 20 + [3] * 20
    other = epoch([np.arange(40), np.arange(40, 80)], [2.5, 0.1], group_of, epoch=2)[0]
    assert set(other.rows[other.rows >= 40]) != set(steps.rows[steps.rows >= 40]), "each epoch samples anew"


def test_rows_are_held_out_in_proportion() -> None:
    held = order.hold_out([60, 30, 10], 10, seed=3)
    assert [len(set(rows.tolist())) for rows in held] == [6, 3, 1]
    assert [len(rows) for rows in order.hold_out([2, 1], 2, seed=3)] == [1, 1]
    with pytest.raises(ConfigError, match="holdout: 3 of 3 rows leave none"):
        order.hold_out([2, 1], 3, seed=3)


def test_positives_and_negatives_are_drawn_evenly_over_epochs() -> None:
    drawn = [order.draw(2, 3, 2, seed=5, epoch=number, row=9) for number in range(600)]
    assert drawn[:3] == [order.draw(2, 3, 2, seed=5, epoch=number, row=9) for number in range(3)]
    pairs = Counter(tuple(negatives) for _, negatives in drawn)
    assert set(pairs) == {(0, 1), (0, 2), (1, 2)}
    assert min(pairs.values()) > 150
    assert 250 < sum(positive for positive, _ in drawn) < 350
    assert order.draw(1, 2, 5, seed=5, epoch=1, row=9) == (0, [0, 1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def mixture(directory: Path, **values: Any) -> FinetuneSettings:
    """Three sources, one of each kind of file, with three rows that are none."""
    (directory / "one.csv").write_text("sent0,sent1,hard_neg\n" + "".join(f'a{n},"p{n}, too",n{n}\n' for n in range(21)) + "same,p,same\n ,p,n\n")
    lists = [{"query": f"q{n}", "pos": [f"r{n}", f"s{n}"], "neg": [f"{word}{n}" for word in "uvw"[: 1 + n % 3]]} for n in range(30)]
    (directory / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*lists, {"query": "q", "pos": None}]))
    instructed = [{"anchor": f"i{n}", "positive": f"j{n}", "instruction": "odd" if n % 2 else "even"} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(instructed), directory / "three.parquet")
    train = [str(directory / "one.csv"), {"path": str(directory / "two.jsonl"), "instruction": ["x", "y"]}, str(directory / "three.parquet")]
    return FinetuneSettings.make({"model": "m", "out": "o", "train": train, "batch_size": 4, "epochs": 2, "hard_negatives": 2, "holdout": 7} | values)


def serial(settings: FinetuneSettings, storage: Storage) -> list[tuple[str, list[str | None], list[str], list[str], list[list[str]]]]:
    """(task, instructions, anchors, positives, negatives) of each step, made in one process, row by row."""
    origins = sources.settle(settings)
    rows: list[dict[str, Any]] = []
    keys: list[Any] = []
    bounds = [0]
    for number, origin in enumerate(origins):
        options: dict[str, Any] = {name: getattr(settings, name) for name in ("access", "distill", "hard_negatives", "mix_tasks")}
        task = reading.FileTask(number=number, source=number, origin=origin, url=origin.files[0], keep_anchors=False, **options)
        made = reading.read_file(task, storage)
        for path, _ in made.parts:
            with storage.open(path) as file:
                rows += pq.read_table(file).to_pylist()
        keys += [made.groups[group] for group in made.group_of]
        bounds.append(len(rows))
    groups = [Group(**dict(zip(Group.__dataclass_fields__, key, strict=True))) for key in sorted(set(keys))]
    group_of = np.array([sorted(set(keys)).index(key) for key in keys], np.int32)
    held = order.hold_out(np.diff(bounds).tolist(), settings.holdout, settings.seed)
    free = [np.setdiff1d(np.arange(start, end), start + out) for start, end, out in zip(bounds, bounds[1:], held, strict=False)]
    found = []
    for number in range(1, settings.epochs + 1):
        steps, _ = order.epoch_steps(free, [1.0] * 3, group_of, groups, batch_size=settings.batch_size, seed=settings.seed, epoch=number)
        for step in range(len(steps)):
            group, taken = groups[steps.groups[step]], steps.rows[steps.starts[step] : steps.starts[step + 1]].tolist()
            drawn = [
                order.draw(len(rows[row]["positives"]), len(rows[row]["negatives"]), group.negatives, seed=settings.seed, epoch=number, row=row)
                for row in taken
            ]
            drawn_one = group.instructions[steps.instructions[step]] if group.instructions else None
            instructions = [rows[row]["instruction"] or drawn_one for row in taken]
            positives = [rows[row]["positives"][chosen] for row, (chosen, _) in zip(taken, drawn, strict=True)]
            negatives = [[rows[row]["negatives"][one] for one in numbers] for row, (_, numbers) in zip(taken, drawn, strict=True)]
            found.append((group.task, instructions, [rows[row]["anchor"] for row in taken], positives, negatives))
    return found


def joined(pieces: list[Batch]) -> tuple[str, list[str | None], list[str], list[str], list[list[str]]]:
    lists = [[item for piece in pieces for item in getattr(piece, name)] for name in ("anchors", "positives", "negatives")]
    return pieces[0].task, [one for piece in pieces for one in piece.instructions], lists[0], lists[1], lists[2]


def test_ray_makes_the_batches_that_one_process_would(tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SHARD_BYTES", 350)  # Several shards.
    settings, storage = mixture(tmp_path), Storage(str(tmp_path / "out"))
    said: list[str] = []
    made = prepare.prepare(settings, storage, say=said.append)
    expected = serial(settings, Storage(str(tmp_path / "serial")))
    assert made.steps == len(expected) > 20
    assert len(list((tmp_path / "out" / "data" / "batches").iterdir())) == len(made.record["shards"]) > 2
    opened = Batches.open(storage)
    for step in reversed(range(opened.steps)):
        assert joined([opened.read(step, 0, 1)]) == expected[step]
        for workers in (2, 3):
            pieces = [opened.read(step, rank, workers) for rank in range(workers)]
            assert joined(pieces) == expected[step]
    held = opened.heldout()
    assert sum(len(piece.anchors) for piece in held) == 7
    assert all(len({len(row) for row in piece.negatives}) == 1 and len(piece.anchors) <= 4 for piece in held)
    kept = {anchor for piece in held for anchor in piece.anchors}
    for first, last in ((0, made.record["steps_per_epoch"][0]), (made.record["steps_per_epoch"][0], made.steps)):
        anchors = Counter(anchor for step in expected[first:last] for anchor in step[2])
        assert max(anchors.values()) == 1
        assert not kept & anchors.keys()
    of_rows = [pair for step in expected if step[0] == "three" for pair in zip(step[1], step[2], strict=True)]
    assert len(of_rows) > 20
    assert all(instruction == ("odd" if int(anchor[1:]) % 2 else "even") for instruction, anchor in of_rows)
    sample = opened.read(0, 0, 1)
    assert all(f" row {int(anchor[1:])}" in source for anchor, source in zip(sample.anchors, sample.sources, strict=True))
    rejects = [row for file in (tmp_path / "out" / "data" / "rejects").iterdir() for row in pq.read_table(file).to_pylist()]
    assert {(Path(row["file"]).name, row["row"], row["column"], row["reason"]) for row in rejects} == {
        ("one.csv", 21, "hard_neg", "negative equals anchor"),
        ("one.csv", 22, "sent0", "empty"),
        ("two.jsonl", 30, "pos", "null"),
    }
    assert any("one: 23 rows, 2 rejected (1 empty, 1 negative equals anchor;" in line for line in said)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert prepare.prepare(settings, storage, say=said.append).steps == made.steps
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == before, "used again"
    with pytest.raises(RunMismatch, match=r"batch_size: there 4, asked for now 8"):
        prepare.prepare(mixture(tmp_path, batch_size=8), storage, say=said.append)
    with (tmp_path / "one.csv").open("a") as file:
        file.write("new,row,here\n")
    with pytest.raises(RunMismatch, match=r"sources\.one\.files"):
        prepare.prepare(settings, storage, say=said.append)

    with pytest.raises(OutputError, match="the data are not prepared"):
        Batches.open(Storage(str(tmp_path / "elsewhere")))
    with pytest.raises(InputError, match=r"batch_size: none of the 71 rows make a batch of 64, the most that may share one are 21"):
        prepare.prepare(mixture(tmp_path, batch_size=64, holdout=0), Storage(str(tmp_path / "large")), say=said.append)


def test_mixed_tasks_share_batches_and_rows_with_a_held_out_anchor_are_left_out(tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = [{"anchor": f"a{n}", "positive": "p"} for n in range(12)]
    two = [{"anchor": f"{'bB'[n % 2]} {n // 2}", "positive": "p"} for n in range(20)]  # Each anchor twice but for its case.
    two[0]["instruction"] = two[1]["instruction"] = "own"
    for name, rows in (("one", one), ("two", two)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"path": str(tmp_path / "one.jsonl"), "instruction": ["x", "y"]}, {"path": str(tmp_path / "two.jsonl"), "instruction": "z"}]
    values = {"model": "m", "out": "o", "train": train, "batch_size": 8, "epochs": 4, "holdout": 5, "mix_tasks": True}
    storage = Storage(str(tmp_path / "out"))
    said: list[str] = []
    made = prepare.prepare(FinetuneSettings.make(values), storage, say=said.append)
    held = [anchor.lower() for piece in made.heldout() for anchor in piece.anchors]
    partners = [row["anchor"] for row in two if row["anchor"].lower() in held and held.count(row["anchor"].lower()) == 1]
    assert len(held) == 5
    assert [source["same_anchor"] for source in made.record["sources"]] == [0, len(partners) // 2]
    assert any(f"{len(partners) // 2} left out (same anchor as a held-out row)" in line for line in said)
    steps = [made.read(step, 0, 1) for step in range(made.steps)]
    assert not {anchor.lower() for step in steps for anchor in step.anchors} & set(held)
    assert len({tuple(sorted(step.anchors)) for step in steps}) > 1
    assert any({"x", "y", "z"} <= set(step.instructions) for step in steps), "drawn by the row"
    told = {pair for step in steps for pair in zip([anchor[0] for anchor in step.anchors], step.instructions, strict=True)}
    assert told - {("b", "own"), ("B", "own")} == {("a", "x"), ("a", "y"), ("b", "z"), ("B", "z")}
    assert all((instruction == "own") == (anchor in "b 0 B 0") for step in steps for anchor, instruction in zip(step.anchors, step.instructions, strict=True))

    monkeypatch.setattr(gathering, "PLACED_ROWS", 4)
    whole, zeros = np.tile(np.arange(2), 5), np.zeros(5, np.int64)
    plan = gathering.Plan(
        steps=Steps(rows=whole, starts=np.arange(0, 11, 2), groups=zeros, instructions=zeros - 1),
        rows_sorted=np.sort(whole),
        by_row=np.argsort(whole, kind="stable"),
        epochs=np.arange(1, 6),
        shards=zeros,
        groups=[ONE],
        told=[("x", "y")],
        seed=1,
    )
    part = pa.table({"part": ["data/rows/000000-000000.parquet"], "first": [0], "source": [0]})
    tables = list(gathering.place_rows(part, ray.put(plan), storage))
    assert [table.num_rows for table in tables] == [4, 4, 2]
    placed = pa.concat_tables(tables).sort_by([("step", "ascending"), ("place", "ascending")])
    assert placed["anchor"].to_pylist() == ["a0", "a1"] * 5
    assert placed["step"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
