"""Fine-tuning on Ray Train from the command line: stopped by force and continued, on two workers, refused where it must be."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.numpy import load_file

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.errors import ConfigError, InputError, OutputError
from llmemb_ray.representation import Representation
from llmemb_ray.training.finetune import finetune
from tests.small_models import SENTENCES

STEPS = 120


@pytest.fixture(scope="module")
def triples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triples") / "triples.jsonl"
    count = len(SENTENCES)
    rows = [
        {"anchor": f"{SENTENCES[n % count]} {n}", "positive": SENTENCES[n % count], "negative": SENTENCES[(n + 1 + n % 3) % count]} for n in range(4 * STEPS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(model: Path, triples: Path, out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "llmemb_ray.cli", "finetune", "--model", str(model), "--train", str(triples), "--out", str(out)]
    return [*words, "--batch-size", "4", "--checkpoint-steps", "10", "--lora-rank", "4", "--cpus-per-worker", "1", *more]


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=240)


def wait_for_checkpoint(out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while not any(int(path.parent.name[5:]) >= step for path in out.glob("checkpoints/step-*/complete.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)


def weights(out: Path) -> dict[str, Any]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.timeout(600)
def test_killed_as_a_whole_and_then_a_worker_it_ends_with_the_weights_of_an_undisturbed_one(model: Path, triples: Path, tmp_path: Path) -> None:
    undisturbed = run(command(model, triples, tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert f"step {STEPS}/{STEPS}, loss" in undisturbed.stderr

    out = tmp_path / "killed"
    first = subprocess.Popen(command(model, triples, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(out, 10, first)
    family = [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)
    assert not (out / "finetuned.json").exists()
    reached = max(int(path.parent.name[5:]) for path in out.glob("checkpoints/step-*/complete.json"))
    assert 10 <= reached < STEPS

    with open(tmp_path / "log", "w") as log:
        second = subprocess.Popen(command(model, triples, out), stdout=subprocess.DEVNULL, stderr=log)
        wait_for_checkpoint(out, reached + 10, second)
        (worker,) = [process for process in psutil.Process(second.pid).children(recursive=True) if "RayTrainWorker" in " ".join(process.cmdline())]
        worker.kill()
        assert second.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    told = (tmp_path / "log").read_text()
    assert f"goes on from step {reached}" in told
    ours, theirs = weights(out), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10, STEPS + 1, 10))

    done = run(command(model, triples, out))
    assert "is finished already" in done.stderr
    other = run(command(model, triples, out, "--learning-rate", "0.5"))
    assert other.returncode == 2
    assert "training.learning_rate: there 0.0001, asked for now 0.5" in other.stderr


@pytest.mark.timeout(300)
def test_two_workers_train_what_one_does_on_the_same_batches(model: Path, triples: Path, tmp_path: Path) -> None:
    """Without dropout, whose random numbers are each worker's own; and what cannot be divided is refused."""
    more = ["--max-steps", "6", "--lora-dropout", "0", "--learning-rate", "1e-3"]
    for workers in ("1", "2"):
        done = run(command(model, triples, tmp_path / workers, *more, "--workers", workers))
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert max(abs(one[name] - two[name]).max() for name in one) < 1e-4
    with pytest.raises(ConfigError, match="4 rows do not divide among 3 workers; take 6 or a multiple"):
        FinetuneSettings.make({"model": "m", "train": ["x"], "out": "o", "batch_size": 4, "workers": "1:3"})


def test_a_column_that_is_missing_ends_it_with_the_file_and_its_columns(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("left,right\na,b\n")
    done = run(command(model, tmp_path / "bad.csv", tmp_path / "out"))
    assert done.returncode == 2
    assert "bad.csv" in done.stderr
    assert "left, right" in done.stderr


def test_a_directory_with_other_files_is_left_alone(model: Path, triples: Path, tmp_path: Path) -> None:
    """Even with overwrite, which deletes what a training left and nothing else."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    settings = {"model": str(model), "train": [str(triples)], "out": str(tmp_path / "out"), "overwrite": True}
    with pytest.raises(OutputError, match=r"is not empty \(thesis\.txt"):
        finetune(FinetuneSettings.make(settings))
    (tmp_path / "out" / "finetune.json").write_text("{}")
    (tmp_path / "out" / "checkpoints").mkdir()
    (tmp_path / "out" / "checkpoints" / "old").write_text("x")
    with pytest.raises(InputError, match=r"none\.csv"):
        finetune(FinetuneSettings.make(settings | {"train": [str(tmp_path / "none.csv")]}))
    assert (tmp_path / "out" / "checkpoints" / "old").exists(), "what cannot begin deletes nothing"


def test_what_is_given_beside_a_preset_wins(tmp_path: Path) -> None:
    Representation(pooling="mean").save(tmp_path)
    values = {"model": "m", "train": ["x"], "out": "o", "preset": "paper2"}
    assert FinetuneSettings.make(values).model_settings().build_representation().append_eos
    made = FinetuneSettings.make(values | {"representation": str(tmp_path), "temperature": 0.1})
    assert made.model_settings().build_representation() == Representation(pooling="mean")
    assert (made.temperature, made.batch_size) == (0.1, 2048)
    with pytest.raises(ConfigError, match="lora_rank: nothing with method full"):
        FinetuneSettings.make(values | {"method": "full", "lora_rank": 4})
