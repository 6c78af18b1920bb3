"""A checkpoint is read whole or not at all, wherever it lies, and the last whole one is found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llmemb_ray.errors import CheckFailed, NotFound
from llmemb_ray.storage import Storage
from llmemb_ray.training.checkpoints import Checkpoint, Checkpoints


def checkpoint(step: int) -> Checkpoint:
    optimizer = {
        "state": {"a.b": {"exp_avg": torch.full((2, 3), step / 8), "step": torch.tensor(float(step))}},
        "groups": [{"params": ["a.b"], "lr": 1e-3, "betas": [0.9, 0.999]}],
    }
    return Checkpoint(step=step, state={"a.b": torch.arange(6.0).view(2, 3).t() + step}, optimizer=optimizer, info={"best": 0.25, "rows": [{"step": step}]})


def same(found: Checkpoint, step: int) -> bool:
    wanted = checkpoint(step)
    values = found.optimizer["state"]["a.b"]
    return (
        found.step == step
        and torch.equal(found.state["a.b"], wanted.state["a.b"])
        and all(torch.equal(values[key], value) for key, value in wanted.optimizer["state"]["a.b"].items())
        and found.optimizer["groups"] == wanted.optimizer["groups"]
        and found.info == wanted.info
    )


class Killed(BaseException):
    """Ends a process at once."""


def test_a_kill_in_the_middle_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each of a checkpoint's writes in turn, of a new step and of one that is written again."""
    for step, writes in ((20, 4), (10, 4)):
        for last in range(writes):
            storage = Storage(str(tmp_path / f"{step}-{last}"))
            checkpoints = Checkpoints(storage)
            assert checkpoints.latest() is None
            checkpoints.write(checkpoint(5))
            checkpoints.write(checkpoint(10))
            done: list[str] = []

            def put(path: str, data: Any, storage: Storage = storage, done: list[str] = done, last: int = last) -> None:
                if len(done) == last:
                    raise Killed
                done.append(path)
                Storage.put(storage, path, data)

            with monkeypatch.context() as patch:
                patch.setattr(storage, "put", put)
                with pytest.raises(Killed):
                    checkpoints.write(checkpoint(step))
            assert checkpoints.latest() == (10 if step == 20 else 5)
            checkpoints.keep()
            checkpoints.write(checkpoint(step))
            assert checkpoints.latest() == step
            assert same(checkpoints.read(step), step)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "marker"])
def test_a_damaged_one_is_passed_over_and_said_so(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(Storage(str(tmp_path)))
    for step in (10, 20):
        checkpoints.write(checkpoint(step))
    file = tmp_path / "checkpoints" / "step-000020" / ("complete.json" if damage == "marker" else "optimizer.safetensors")
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage != "changed" else data[:-1] + bytes([data[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest() == 10
    assert file.name in caplog.text
    assert "of step 10, is taken" in caplog.text
    with pytest.raises(CheckFailed, match=file.name):
        checkpoints.read(20)
    with pytest.raises(NotFound):
        checkpoints.read(15)


@pytest.mark.parametrize("where", ["directory", "s3"])
def test_the_newest_two_and_the_best_are_kept(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if where == "s3":
        server = request.getfixturevalue("s3")
        storage = Storage(server.url("training"), server.access())
    else:
        storage = Storage(str(tmp_path / "training"))
    checkpoints = Checkpoints(storage)
    for step in (10, 20, 30, 40):
        assert checkpoints.write(checkpoint(step)) > 0
    storage.put("checkpoints/step-000015/state.safetensors", b"left by a process that was killed")
    storage.put("checkpoints/step-000050/state.safetensors", b"being written")
    checkpoints.keep([10])
    assert checkpoints.steps() == [10, 30, 40]
    assert {entry.path.split("/")[1] for entry in storage.list("checkpoints")} == {f"step-0000{step}" for step in (10, 30, 40, 50)}
    assert checkpoints.latest() == 40
    assert same(checkpoints.read(10), 10)
    assert not [entry.path for entry in storage.list() if entry.path.endswith((".pt", ".pkl", ".bin"))], "nothing is pickled"
