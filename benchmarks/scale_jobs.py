"""The job with stand-ins for GPUs, run and watched; its models without weights and its corpora."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.scale_standin import LOG, RATE, ROOT
from benchmarks.scale_watch import Look, Watch

SHARED = ROOT.parent / "shared"
CORES = 2
"""In Ray's books."""
ROW_CHARACTERS = 480
"""Of SciFact's abstracts: about a hundred tokens of OPT."""
LINKS = 50_000
"""To one file; ext4 allows 65,000."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a job left behind: looks at its processes, the log of its workers [time, what, seconds, amount], seconds and exit code."""

    looks: list[Look]
    events: list[list[Any]]
    seconds: float
    code: int


def make_config(directory: Path, dimension: int) -> Path:
    """A model's configuration without weights, and OPT's tokenizer."""
    from transformers import GPT2TokenizerFast, LlamaConfig

    tokenizer = GPT2TokenizerFast(str(SHARED / "models/opt_tokenizer/vocab.json"), str(SHARED / "models/opt_tokenizer/merges.txt"))
    tokenizer.save_pretrained(directory)
    heads = max(1, dimension // 128)
    sizes = {"hidden_size": dimension, "intermediate_size": dimension, "num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": 1}
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes).save_pretrained(directory)
    return directory


def make_corpus(directory: Path, files: int, rows: int, group: int, texts: list[str]) -> Path:
    """One file of so many rows, and hard links to it. group: rows of a row group."""
    directory.mkdir(parents=True)
    first = directory / "000000.parquet"
    column = [texts[number % len(texts)] for number in range(rows)]
    pq.write_table(pa.table({"id": pa.array(range(rows), pa.int64()), "text": column}), first, row_group_size=group)
    for number in range(1, files):
        if number % LINKS == 0:
            first = Path(shutil.copyfile(first, directory / f"{number:06d}.parquet"))
        else:
            os.link(first, directory / f"{number:06d}.parquet")
    return directory


def abstracts() -> list[str]:
    lines = (SHARED / "data/scifact/corpus.jsonl").read_text().splitlines()
    return [json.loads(line)["text"][:ROW_CHARACTERS] for line in lines]


def committed(out: Path) -> Callable[[], int]:
    """How many units are, as far as it was ever seen: at the end their records go into one file."""
    most = 0

    def count() -> int:
        nonlocal most
        directory = out / "_llmemb/commits"
        most = max(most, len(os.listdir(directory)) if directory.is_dir() else 0)
        return most

    return count


def run_job(
    scratch: Path, corpus: str, out: str, model: Path, *more: str, actors: int, rate: float, until: Callable[[Watch, Path], bool] | None = None,
    environment: dict[str, str] | None = None,
) -> Ran:  # fmt: skip
    """``llmemb embed`` with stand-ins. until: asked every second whether the job may be stopped, by SIGTERM."""
    log = Path(tempfile.mkdtemp(dir=scratch, prefix="log-"))
    command = [sys.executable, "-P", str(ROOT / "benchmarks/scale_standin.py"), str(actors), str(CORES), "embed", corpus, out, "--model", str(model)]
    command += ["--prompt", "none", "--backend", "hf", "--actors", str(actors), "--gpus-per-actor", "1", "--cpus-per-actor", "0.01", *more]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0", RATE: str(rate), LOG: str(log)} | (environment or {})
    began = time.monotonic()
    with open(scratch / "job.log", "ab") as said:
        process = subprocess.Popen(command, env=variables, stdout=said, stderr=said)
    watch = Watch(process.pid, committed(Path(out)) if "://" not in out else lambda: 0)
    children: list[psutil.Process] = []
    while process.poll() is None:
        time.sleep(1)
        if until is not None and until(watch, log):
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            until = None
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
    looks = watch.stop()
    psutil.wait_procs(children, timeout=30)
    if process.returncode not in (0, 1, -signal.SIGKILL) or (process.returncode and not children):
        raise SystemExit(f"the job ended with exit code {process.returncode}:\n{(scratch / 'job.log').read_text()[-3000:]}")
    return Ran(looks=looks, events=events_of(log), seconds=time.monotonic() - began, code=process.returncode)


def events_of(log: Path) -> list[list[Any]]:
    lines = [line for path in log.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return sorted(json.loads(line) for line in lines if line.endswith("\n"))
