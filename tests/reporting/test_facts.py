"""What is collected of runs of every kind: exact sums from commits, rates recomputed by hand, texts read back or said to be missing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llmemb_ray.errors import OutputError
from llmemb_ray.reporting.accounts import ESTIMATE, throughput
from llmemb_ray.reporting.texts import EXCERPT, excerpt
from llmemb_ray.shards.commits import Commit
from llmemb_ray.shards.receipt import Receipt
from llmemb_ray.storage import Storage
from tests.reporting.conftest import HOSTILE, facts_of, made_run
from tests.small_jobs import embed, opened, rows_of, settled, write

VECTORS = np.random.default_rng(2).standard_normal((55, 8)).astype(np.float32)


def commit(start: float, end: float, rows: int, tokens: int, host: str = "a", copied: int = 0) -> Commit:
    """A unit worked on from ``start`` to ``end``, Unix time."""
    times = {"seconds_model": end - start, "finished": end, "host": host}
    return Commit(unit=f"{start}-{host}", attempt="x", file=0, start=0, rows=rows, embedded=rows, rejected=0, tokens=tokens, tokens_copied=copied, **times)


# -- rates -------------------------------------------------------------------------------------------


def test_rates_are_work_over_time_and_all_work_is_in_them() -> None:
    rates = throughput([commit(0, 60, 30, 600), commit(0, 30, 10, 300, "b"), commit(30, 60, 20, 1200, "b", copied=300)])
    assert rates is not None
    assert (rates.bin_seconds, len(rates.seconds)) == (1.0, 60)
    assert rates.tokens_per_s["a"] == pytest.approx([10.0] * 60)
    assert rates.tokens_per_s["b"] == pytest.approx([10.0] * 30 + [30.0] * 30)
    assert sum(rates.rows_per_s) * rates.bin_seconds == pytest.approx(60)
    assert rates.clock == rates.seconds
    assert rates.pauses == []


def test_a_pause_is_cut_out_of_the_time_but_not_of_the_clock() -> None:
    rates = throughput([commit(1000, 1060, 10, 600), commit(91060, 91120, 10, 1200)])
    assert rates is not None
    assert rates.paused_seconds == 90000
    assert rates.pauses == [60.0]
    assert rates.bin_seconds == 2.0
    assert rates.tokens_per_s["a"] == pytest.approx([10.0] * 30 + [20.0] * 30)
    assert (rates.clock[29], rates.clock[30]) == (1059.0, 91061.0)


def test_many_hosts_are_drawn_as_one_line() -> None:
    rates = throughput([commit(0, 60, 1, 60, f"host-{number}") for number in range(50)])
    assert rates is not None
    assert rates.tokens_per_s == {"": pytest.approx([50.0] * 60)}


def test_no_unit_has_no_rate() -> None:
    assert throughput([]) is None


def test_slowest_units_and_hosts_are_ordered(tmp_path: Path) -> None:
    facts = facts_of(made_run(tmp_path, VECTORS), with_text=False)
    assert [unit.seconds_model for unit in facts.slowest] == [70, 60, 50, 40, 30, 20, 10]
    rows = [8, 7, 8, 7, 9, 8, 8]
    rates = [7 * count / (10 * (number + 1)) for number, count in enumerate(rows)]
    assert [unit.tokens_per_s for unit in facts.slowest] == pytest.approx(rates[::-1])
    assert [unit.of_median for unit in facts.slowest] == pytest.approx([rate / sorted(rates)[3] for rate in rates[::-1]])
    assert [(host.host, host.units, host.rows) for host in facts.hosts] == [("host-1", 3, 22), ("host-0", 4, 33)]
    assert [host.tokens_per_s for host in facts.hosts] == pytest.approx([7 * 22 / (20 + 40 + 60), 7 * 33 / (10 + 30 + 50 + 70)])


# -- runs of every kind ------------------------------------------------------------------------------


def test_a_finished_run_tells_what_its_receipt_tells(hostile_once: Path) -> None:
    facts = facts_of(hostile_once / "out")
    receipt = opened(hostile_once / "out").receipt
    assert receipt is not None
    assert facts.accounts == receipt.to_dict()
    assert (facts.state, facts.units, facts.units_committed) == ("finished", 4, 4)
    assert {reason.reason: reason.count for reason in facts.rejects} == {"empty": 2, "null": 1, "undecodable": 1}
    (undecodable,) = next(reason.examples for reason in facts.rejects if reason.reason == "undecodable")
    assert (undecodable.source_row, undecodable.id, undecodable.text) == (1, "b1", None)
    assert "not UTF-8" in undecodable.detail
    lengths = rows_of(hostile_once / "out")["n_tokens"].to_numpy()
    assert facts.lengths is not None
    assert (facts.lengths.counted, facts.lengths.longest, sum(facts.lengths.counts)) == (len(lengths), lengths.max(), len(lengths))
    assert facts.lengths.median == sorted(lengths)[(len(lengths) + 1) // 2 - 1]


def test_points_hold_their_own_text(hostile_once: Path) -> None:
    facts = facts_of(hostile_once / "out")
    by_id = {point.id: point for point in facts.points}
    assert len(by_id) == 76
    for row, text in enumerate(HOSTILE):
        assert by_id[f"<i>{row}</i>"].text == excerpt(text)
    assert facts.texts_missing == []
    json.dumps(facts.to_dict())


def test_without_text_none_is_read(hostile_once: Path) -> None:
    facts = facts_of(hostile_once / "out", with_text=False)
    assert {point.text for point in facts.points} == {None}
    assert {example.text for reason in facts.rejects for example in reason.examples} == {None}


def test_an_excerpt_is_one_line_and_short() -> None:
    assert excerpt("a\r\n b\t\u2028c ") == "a b c"
    assert len(excerpt("word " * 1000)) == EXCERPT
    assert excerpt("x" * 10_000_000).endswith("x…")
    assert excerpt("x" * EXCERPT) == "x" * EXCERPT


def test_an_unfinished_run_tells_of_its_units(tmp_path: Path) -> None:
    run = made_run(tmp_path, VECTORS)
    (tmp_path / "_llmemb" / "commits" / f"{run.commits[3].unit}.json").unlink()
    facts = facts_of(tmp_path, with_text=False)
    assert (facts.state, facts.units, facts.units_committed) == ("stopped", 7, 6)
    assert (facts.accounts["rows_read"], facts.accounts["vectors"], facts.health.of) == (48, 48, 48)
    assert set(facts.accounts) == set(Receipt.__dataclass_fields__)
    assert (facts.accounts["seconds_wall"], facts.accounts["finished"]) == (None, None)


def test_a_run_that_has_no_unit_yet_is_told_as_such(tmp_path: Path, model: Path, corpus: Path) -> None:
    settled(corpus, tmp_path / "out", model)
    facts = facts_of(tmp_path / "out")
    assert (facts.state, facts.units_committed, facts.accounts["rows_read"], facts.health.sampled) == ("stopped", 0, 0, 0)
    assert (facts.points, facts.lengths, facts.throughput, facts.health.findings) == ([], None, None, [])


def test_a_run_of_rejects_alone_has_no_vectors_to_judge(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [None, " ", None, ""])
    embed(tmp_path / "in", tmp_path / "out", model, max_reject_rate=1)
    facts = facts_of(tmp_path / "out")
    assert [(reason.reason, reason.count, len(reason.examples)) for reason in facts.rejects] == [("empty", 2, 2), ("null", 2, 2)]
    assert (facts.health.sampled, facts.points, facts.texts_missing) == (0, [], [])


def test_a_reason_has_a_few_examples_from_as_few_files_as_need_be(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [None] * 40 + ["text"])
    embed(tmp_path / "in", tmp_path / "out", model, max_reject_rate=1, rows_per_unit=4)
    run = opened(tmp_path / "out")
    last = run.commits[-2].rejects
    assert last is not None
    (tmp_path / "out" / last).unlink()
    (reason,) = facts_of(tmp_path / "out").rejects
    assert (reason.count, [example.source_row for example in reason.examples]) == (40, [0, 1, 2, 3, 4])


def test_a_chunk_shows_its_own_part_of_the_text(tmp_path: Path, model: Path) -> None:
    text = " ".join(f"Sentence {number} is here." for number in range(30))
    write(tmp_path / "in" / "a.parquet", [text, "short"])
    embed(tmp_path / "in", tmp_path / "out", model, chunk_tokens=20, prompt="none")
    facts = facts_of(tmp_path / "out")
    table = rows_of(tmp_path / "out")
    assert len(facts.points) == table.num_rows > 5
    for point, start, end in zip(facts.points, table["chunk_start"].to_pylist(), table["chunk_end"].to_pylist(), strict=True):
        assert point.id is None
        assert point.text == excerpt((text if point.source_row == 0 else "short")[start:end])


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"dtype": "ubinary"}, {"dtype": "ubinary", "centre": True}, {"dtype": "float16"}], ids=str)
def test_runs_of_every_precision_are_read(tmp_path: Path, model: Path, settings: dict[str, object]) -> None:
    write(tmp_path / "in" / "a.parquet", [f"text {row}" for row in range(40)])
    embed(tmp_path / "in", tmp_path / "out", model, **settings)
    facts = facts_of(tmp_path / "out")
    assert (facts.calibration is not None) == ("centre" in settings or settings["dtype"] == "int8")
    assert (facts.health.clipped_share is not None) == (settings["dtype"] == "int8")
    assert len(facts.points) == 40
    assert facts.health.norm_median == pytest.approx(1, abs=1e-3)


def test_appended_files_and_copied_vectors_are_counted(tmp_path: Path, model: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ["same", "same", "other"])
    embed(tmp_path / "in", tmp_path / "out", model, dedup="exact")
    write(tmp_path / "in" / "b.parquet", ["same", "third"])
    embed(tmp_path / "in", tmp_path / "out", model, dedup="exact", append=True)
    facts = facts_of(tmp_path / "out")
    assert (facts.generation, facts.files, facts.accounts["copied"]) == (1, 2, opened(tmp_path / "out").receipt.copied)  # type: ignore[union-attr]
    assert facts.accounts["copied"] >= 1
    assert {point.text for point in facts.points} == {"same", "other", "third"}


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_source_files_that_are_not_what_they_were_leave_their_texts_out_with_a_reason(tmp_path: Path, model: Path, change: str) -> None:
    for name in "ab":
        write(tmp_path / "in" / f"{name}.parquet", [f"{name} {row}" for row in range(5)])
    embed(tmp_path / "in", tmp_path / "out", model)
    path = tmp_path / "in" / "b.parquet"
    path.unlink() if change == "gone" else os.utime(path, (5, 5))
    facts = facts_of(tmp_path / "out")
    (reason,) = facts.texts_missing
    assert str(path) in reason
    assert change in reason
    assert [point.text for point in facts.points] == [f"a {row}" for row in range(5)] + [None] * 5


# -- the estimate ------------------------------------------------------------------------------------


def test_the_estimate_stands_beside_the_actual_for_the_numbers_that_both_have(tmp_path: Path, model: Path, corpus: Path) -> None:
    receipt = embed(corpus, tmp_path / "out", model)
    (tmp_path / "out" / ESTIMATE).unlink(missing_ok=True)
    assert facts_of(tmp_path / "out").estimate == []
    said = {
        "tokens": receipt.tokens * 2,
        "vectors": 0,
        "seconds_model": 1.5,
        "dtype": "float32",
        "rejects_by_reason": {},
        "unheard_of": 3,
        "truncated": None,
        "units": True,
    }
    storage = Storage(str(tmp_path / "out"))
    storage.put(ESTIMATE, json.dumps(said).encode())
    compared = {line.name: line for line in facts_of(tmp_path / "out").estimate}
    assert set(compared) == {"tokens", "vectors", "seconds_model"}
    assert compared["tokens"].ratio == 0.5
    assert compared["vectors"].ratio is None
    assert compared["vectors"].actual == receipt.vectors
    for broken, said_of in ((b"{", "is not JSON"), (b"[1]", "holds no estimate")):
        storage.put(ESTIMATE, broken)
        with pytest.raises(OutputError, match=said_of):
            facts_of(tmp_path / "out")
