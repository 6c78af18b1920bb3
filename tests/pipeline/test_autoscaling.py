"""``--actors MIN:MAX`` on a real local Ray: the pool grows while work waits, and what idles goes, with its GPU, while the last unit is still at work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import llmemb_ray
from llmemb_ray.shards.receipt import Receipt
from tests.pipeline.conftest import ROOT
from tests.small_jobs import problems_of, write

pytestmark = pytest.mark.timeout(400)

GATES = "LLMEMB_TEST_GATES"
"""Names a directory in the environment: no unit is begun before the file ``all`` is there, the one of row LAST_ROW not before ``last`` is."""

MOST, UNITS, LAST_ROW = 3, 40, 70


def install() -> None:
    """Puts the gates before the units of an embedder's process. What imports torch is left to it: other workers do without."""
    from llmemb_ray.pipeline import graph
    from llmemb_ray.pipeline.prepare import Prepared

    gates, embed = Path(os.environ[GATES]), graph.EmbedUnits._embed

    def gated(self: graph.EmbedUnits, envelope: Any) -> Any:
        gate = gates / ("last" if Prepared.from_envelope(envelope).unit.start == LAST_ROW else "all")
        while not gate.exists():
            time.sleep(0.05)
        return embed(self, envelope)

    graph.EmbedUnits._embed = gated  # type: ignore[method-assign]


@pytest.fixture
def gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray whose embedders wait at the gates in this directory."""
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")
    gates = tmp_path / "gates"
    gates.mkdir()
    hook = {"worker_process_setup_hook": f"{__name__}.install", "env_vars": {"PYTHONPATH": ROOT, GATES: str(gates)}}
    ray.init(address="local", num_cpus=2, num_gpus=MOST + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=hook)
    yield gates
    ray.shutdown()


def actors() -> set[int]:
    """Processes of embedder actors that live."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "EmbedUnits" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def watched(job: Future[Receipt], over: Callable[[int], bool]) -> list[int]:
    """How many actors there were, until it is ``over``."""
    seen: list[int] = []
    deadline = time.monotonic() + 150
    while not (seen and over(seen[-1])):
        assert not job.done(), f"the job ended, the number of its actors having been {seen}: {job.result()}"
        assert time.monotonic() < deadline, f"so many actors were there: {seen}"
        time.sleep(0.2)
        seen.append(len(actors()))
    return seen


def test_a_pool_grows_while_work_waits_and_shrinks_at_the_end(gates: Path, model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "corpus.parquet", [f"document {row}" for row in range(2 * UNITS)], id=list(range(2 * UNITS)), row_group_size=2 * UNITS)
    commits = tmp_path / "out" / "_llmemb" / "commits"
    settings = {"actors": f"1:{MOST}", "gpus_per_actor": 1, "compute_dtype": "float32", "rows_per_unit": 2, "quiet": True}
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(llmemb_ray.embed, str(source), str(tmp_path / "out"), model=str(model), **settings)
        try:
            grown = [count for count in watched(job, lambda count: count == MOST) if count]
            assert grown[:5] == [1] * 5, f"it begins with MIN, whose model takes seconds to load: {grown}"
            (gates / "all").touch()
            shrunk = watched(job, lambda count: count == 1)
            assert max(shrunk) == MOST, shrunk
            assert len(list(commits.glob("*.json"))) < UNITS
        finally:
            for gate in ("all", "last"):
                (gates / gate).touch()
        receipt = job.result(100)
    assert receipt.units == UNITS
    assert problems_of(tmp_path / "out", source) == []
