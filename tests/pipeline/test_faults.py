"""A small job that fails, or dies, at its n-th storage operation, for every n; then the same command, then the same result.

Each job runs in a child process of its own, forked before torch has started threads, on real files through a
file system that can be told to fail.
"""

from __future__ import annotations

import errno
import json
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmemb_ray
from llmemb_ray.shards import commits, lease
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.faulty_fs import FAULTS, FOREVER
from tests.small_jobs import vectors_of

DIED = 9


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of ten rows in two row groups, one row of them bad: two units, one of them with rejects."""
    path = tmp_path_factory.mktemp("faults") / "corpus.parquet"
    texts = [f"row {row} says something" if row != 3 else None for row in range(10)]
    pq.write_table(pa.table({"id": list(range(10)), "text": texts}), path, row_group_size=5)
    return path


def in_child(work: Callable[[], None]) -> int:
    """Runs ``work`` in a forked process and returns its exit code; 1 with a traceback for an exception."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        import torch

        torch.set_num_threads(1)
        work()
        code = 0
    except llmemb_ray.LlmembError as error:
        code = 10 + error.exit_code
    except BaseException:  # noqa: BLE001 - the child must never return into the parent's test
        traceback.print_exc()
        code = 1
    os._exit(code)


@pytest.fixture(scope="module", autouse=True)
def no_heartbeat() -> Iterator[None]:
    """Operations are counted: none may come or not as time goes by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "HEARTBEAT_SECONDS", 3600.0)
        yield


def embed(source: Path, model: Path, output: Path) -> None:
    llmemb_ray.embed(
        f"faulty://{source}", f"faulty://{output}", model=str(model), actors="0", rows_per_unit=5, token_budget=512, quiet=True, storage_retry_seconds=2.0
    )


def contents(output: Path) -> dict[int, np.ndarray]:
    run = Run(Storage(str(output)))
    return {id_: vector for _, table in run.shards() for id_, vector in zip(table["id"].to_pylist(), vectors_of(table["embedding"]), strict=True)}


@pytest.fixture(scope="module")
def undisturbed(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, np.ndarray], list[tuple[str, str]]]:
    """What an undisturbed job writes, and the storage operations that it takes."""
    directory = tmp_path_factory.mktemp("undisturbed")

    def work() -> None:
        with FAULTS.recording() as log:
            embed(source, model, directory / "out")
        (directory / "log.json").write_text(json.dumps(log))

    assert in_child(work) == 0
    return contents(directory / "out"), [tuple(entry) for entry in json.loads((directory / "log.json").read_text())]


def resumes(source: Path, model: Path, output: Path, expected: dict[int, np.ndarray]) -> None:
    """The same command again ends well, leaves committed units alone, and makes what an undisturbed job makes."""
    before = {commit.unit: commit.attempt for commit in commits.read_all(Storage(str(output)))} if output.exists() else {}
    assert in_child(lambda: embed(source, model, output)) == 0
    run = Run(Storage(str(output)))
    findings = verify(run, against=[str(source)])
    # The corpus was planned under another protocol, so it is compared by order; nothing else may be found.
    assert findings.problems == []
    after = {commit.unit: commit.attempt for commit in run.commits}
    assert {unit: after[unit] for unit in before} == before, "a committed unit was attempted again"
    found = contents(output)
    assert found.keys() == expected.keys()
    assert max(float(np.abs(found[key] - expected[key]).max()) for key in expected) <= 1e-5
    left = [str(path) for path in output.rglob("*") if ".tmp-" in path.name]
    assert left == []


def count(log: list[tuple[str, str]], *operations: str) -> int:
    return sum(operation in operations for operation, _ in log) if operations else len(log)


def test_the_job_is_small_enough_to_break_everywhere(undisturbed: tuple[dict[int, np.ndarray], list[tuple[str, str]]]) -> None:
    vectors, log = undisturbed
    assert set(vectors) == set(range(10)) - {3}
    writes = [path.rsplit("/", 1)[1] for operation, path in log if operation == "write"]
    assert sum("receipt" in path for path in writes) == 1
    assert 20 < len(log) < 150


@pytest.mark.timeout(600)
def test_dying_before_any_operation(source: Path, model: Path, tmp_path: Path, undisturbed: tuple[dict[int, np.ndarray], list[tuple[str, str]]]) -> None:
    expected, log = undisturbed
    for number in range(1, len(log) + 1):
        output = tmp_path / str(number)

        def die(number: int = number, output: Path = output) -> None:
            FAULTS.set(at=number, die=True)
            embed(source, model, output)

        assert in_child(die) == DIED, f"operation {number}, {log[number - 1]}"
        resumes(source, model, output, expected)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["half", "after"])
def test_dying_in_the_middle_of_any_write(
    moment: str, source: Path, model: Path, tmp_path: Path, undisturbed: tuple[dict[int, np.ndarray], list[tuple[str, str]]]
) -> None:
    expected, log = undisturbed
    for number in range(1, count(log, "write") + 1):
        output = tmp_path / str(number)

        def die(number: int = number, output: Path = output) -> None:
            FAULTS.set(at=number, die=True, moment=moment, operations=("write",))
            embed(source, model, output)

        assert in_child(die) == DIED
        resumes(source, model, output, expected)


@pytest.mark.timeout(600)
def test_a_passing_failure_of_any_operation_is_survived(
    source: Path, model: Path, tmp_path: Path, undisturbed: tuple[dict[int, np.ndarray], list[tuple[str, str]]]
) -> None:
    expected, log = undisturbed
    for number in range(1, len(log) + 1):
        output = tmp_path / str(number)

        def stumble(number: int = number, output: Path = output) -> None:
            FAULTS.set(at=number, error=errno.ECONNRESET)
            embed(source, model, output)

        assert in_child(stumble) == 0, f"operation {number}, {log[number - 1]}"
        found = contents(output)
        assert found.keys() == expected.keys()


@pytest.mark.timeout(600)
def test_a_lasting_failure_of_any_write_ends_the_job_and_loses_nothing(
    source: Path, model: Path, tmp_path: Path, undisturbed: tuple[dict[int, np.ndarray], list[tuple[str, str]]]
) -> None:
    expected, log = undisturbed
    for number in range(1, count(log, "write") + 1):
        output = tmp_path / str(number)

        def fail(number: int = number, output: Path = output) -> None:
            FAULTS.set(at=number, times=FOREVER, error=errno.ENOSPC, operations=("write",))
            embed(source, model, output)

        assert in_child(fail) == 11, "a storage error ends the job with exit code 1"
        resumes(source, model, output, expected)
