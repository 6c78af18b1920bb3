"""Does memory grow with the rows? Embeds a corpus from a real S3 server and samples every process of the job.

    python benchmarks/memory.py rows 100000 1000000        peak of driver and workers for corpora of these sizes
    python benchmarks/memory.py rows 10000000 --kill       the same, the driver killed once half-way and started again
    python benchmarks/memory.py plan 50000                 time and memory to plan a corpus of so many files

Each writes a record to benchmarks/records: JSON, and for ``rows`` a plot of memory over time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from llmemb_ray.pipeline.planning import versions
from llmemb_ray.shards.run import Run
from llmemb_ray.shards.verify import verify
from llmemb_ray.storage import Storage
from tests.s3_server import S3Server
from tests.small_models import make_model, tokenizer_of

RECORDS = Path(__file__).parent / "records"
ROWS_PER_FILE, ROWS_PER_GROUP, ROWS_PER_UNIT = 250_000, 50_000, 10_000
SAMPLE_SECONDS = 0.5
ROLES = {"EmbedUnits": "actor", "read_and_tokenize": "reader", "raylet": "raylet", "gcs_server": "gcs"}


def make_corpus(directory: Path, rows: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for start in range(0, rows, ROWS_PER_FILE):
        numbers = range(start, min(rows, start + ROWS_PER_FILE))
        table = pa.table({"id": pa.array(numbers, pa.int64()), "text": [f"item {number}" for number in numbers]})
        pq.write_table(table, directory / f"{start // ROWS_PER_FILE:05d}.parquet", row_group_size=ROWS_PER_GROUP)


class Sampler:
    """Resident memory in MB of a process and its descendants, by role, every half second. Pages that processes share (the
    object store's) are taken out: they have a fixed size of their own."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._stop = threading.Event()
        self.samples: list[dict[str, float]] = []
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            sample: dict[str, float] = {"t": round(time.monotonic() - self._started, 1)}
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                try:
                    title = " ".join(process.cmdline()[:2])
                    memory = process.memory_info()
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
                role = "driver" if process.pid == self._root.pid else next((role for word, role in ROLES.items() if word in title), "other")
                sample[role] = max(sample.get(role, 0.0), (memory.rss - memory.shared) / 2**20)
            self.samples.append(sample)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def peaks(self) -> dict[str, float]:
        roles = {role for sample in self.samples for role in sample if role != "t"}
        return {role: round(max(sample.get(role, 0.0) for sample in self.samples)) for role in sorted(roles)}


def embed(server: S3Server, model: Path, corpus: str, output: str, *, kill_at_units: int | None = None) -> Sampler:
    """Runs ``llmemb embed``; kills the driver when so many units are committed."""
    command = [sys.executable, "-m", "llmemb_ray.cli", "embed", server.url(corpus), server.url(output), "--model", str(model)]
    command += ["--prompt", "none", "--pooling", "mean", "--actors", "1", "--rows-per-unit", str(ROWS_PER_UNIT), "--token-budget", "8192"]
    environment = os.environ | server.environment | {"HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"}
    process = subprocess.Popen(command, env=environment)
    sampler = Sampler(process.pid)
    commits = server.path(f"{output}/_llmemb/commits")
    while process.poll() is None:
        time.sleep(1)
        if kill_at_units is not None and commits.is_dir() and len(list(commits.iterdir())) >= kill_at_units:
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.wait()
            psutil.wait_procs(children, timeout=30)
            sampler.stop()
            return sampler
    sampler.stop()
    if process.returncode:
        raise SystemExit(f"llmemb embed ended with exit code {process.returncode}")
    return sampler


def rows(sizes: list[int], *, kill: bool) -> list[dict[str, Any]]:
    """One record for each size."""
    records = []
    with tempfile.TemporaryDirectory(prefix="llmemb-memory-") as scratch:
        tokenizer = tokenizer_of([f"item {number}" for number in range(2000)])
        model = make_model(Path(scratch) / "model", tokenizer=tokenizer, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        for size in sizes:
            server = S3Server(Path(scratch) / f"s3-{size}")
            make_corpus(server.path("corpus"), size)
            server.start()
            started = time.monotonic()
            samplers = []
            if kill:
                samplers.append(embed(server, model, "corpus", "out", kill_at_units=size // ROWS_PER_UNIT // 2))
            samplers.append(embed(server, model, "corpus", "out"))
            seconds = time.monotonic() - started
            run = Run(Storage(server.url("out"), server.access()))
            findings = verify(run, level="full")
            server.kill()
            assert run.receipt is not None
            record = {
                "rows": size,
                "units": run.receipt.units,
                "seconds": round(seconds, 1),
                "rows_per_second": round(size / seconds),
                "tokens": run.receipt.tokens,
                "rows_embedded": run.receipt.rows_embedded,
                "verified": findings.sound,
                "killed_once": kill,
                "peak_mb": [sampler.peaks() for sampler in samplers],
                "samples": [sampler.samples[:: max(1, len(sampler.samples) // 200)] for sampler in samplers],
            }
            print(json.dumps({name: value for name, value in record.items() if name != "samples"}))
            records.append(record)
    return records


def plan(files: int) -> dict[str, Any]:
    """Plans a corpus of so many one-row-group files on local disk, in this process."""
    from llmemb_ray.config import EmbedSettings
    from llmemb_ray.embedders.embedder import settle
    from llmemb_ray.pipeline import planning

    with tempfile.TemporaryDirectory(prefix="llmemb-plan-") as scratch:
        model = make_model(Path(scratch) / "model")
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        pq.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), corpus / "0.parquet")
        content = (corpus / "0.parquet").read_bytes()
        for number in range(1, files):
            (corpus / f"{number}.parquet").write_bytes(content)
        settings = EmbedSettings.make({"input": [str(corpus)], "output": str(Path(scratch) / "out"), "model": str(model)})
        spec = settle(settings)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started = time.monotonic()
        found, selection = planning.find(settings)
        made = planning.make_plan(settings, spec, found, selection, actors=1, gpu=False)
        planned = time.monotonic()
        made.save(Storage(settings.output))
        saved = time.monotonic()
        record = {
            "files": files,
            "units": sum(1 for _ in made.units()),
            "plan_seconds": round(planned - started, 1),
            "save_seconds": round(saved - planned, 1),
            "peak_mb_more": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before),
            "plan_bytes": sum(entry.size for entry in Storage(settings.output).list()),
        }
    print(json.dumps(record))
    return record


def head() -> dict[str, Any]:
    """What every record says of its making."""
    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {processor}, {psutil.virtual_memory().total // 2**30} GiB, {platform.system()}",
        "versions": versions(),
    }


def write(name: str, records: list[dict[str, Any]]) -> None:
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / f"{name}.json").write_text(json.dumps(head() | {"records": records}, indent=1) + "\n")
    if any("samples" in record for record in records):
        _plot(RECORDS / f"{name}.png", records)


def _plot(path: Path, records: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(records), figsize=(6 * len(records), 4), squeeze=False)
    for axis, record in zip(axes[0], records, strict=True):
        offset = 0.0
        for part, samples in enumerate(record["samples"]):
            for role, colour in (("driver", "C0"), ("actor", "C1"), ("reader", "C2")):
                points = [(offset + sample["t"], sample[role]) for sample in samples if role in sample]
                axis.plot(*zip(*points, strict=True) if points else ([], []), color=colour, label=role if not part else None)
            offset += samples[-1]["t"] if samples else 0.0
            if part < len(record["samples"]) - 1:
                axis.axvline(offset, color="grey", linestyle=":", label="driver killed")
        axis.set(title=f"{record['rows']:,} rows", xlabel="seconds", ylabel="private memory, MB", ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    by_rows = commands.add_parser("rows", help="memory over corpora of growing size")
    by_rows.add_argument("sizes", type=int, nargs="+")
    by_rows.add_argument("--kill", action="store_true", help="kill the driver once half-way")
    by_files = commands.add_parser("plan", help="planning many files")
    by_files.add_argument("files", type=int)
    arguments = parser.parse_args()
    if arguments.command == "rows":
        write("memory-" + "-".join(map(str, arguments.sizes)), rows(arguments.sizes, kill=arguments.kill))
    else:
        write(f"plan-{arguments.files}", [plan(arguments.files)])


if __name__ == "__main__":
    main()
