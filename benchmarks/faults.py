"""Every fault that a cluster has in store, during a running job: the same output afterwards, and the time that it cost.

    python benchmarks/faults.py                    all of them, one after the other
    python benchmarks/faults.py --only node        one of them
    python benchmarks/faults.py --only chaos --seed 7

The job embeds a corpus of 60 units from a real S3 server (rclone) on a real Ray cluster: a head that takes no work and two nodes, each in a network
namespace of its own where this process is root. After each fault the output is compared with that of the same job in one process, row by row, and
verified. The corpus is small and the machine may be shared (``load`` is the mean of processes that wanted to run, over five minutes): times lost
tell the order of magnitude. Each run replaces its faults in records/faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.fault_cluster import Cluster, Network
from benchmarks.memory import RECORDS, head
from llmemb_ray.config import EmbedSettings
from llmemb_ray.pipeline import job
from llmemb_ray.shards.verify import verify
from tests.pipeline.killing import read
from tests.pipeline.poison import HANG_FILE, POISON
from tests.ray_cluster import ENVIRONMENT
from tests.s3_proxy import BadDay
from tests.s3_server import S3Server
from tests.small_models import make_model

UNITS, ROWS_PER_UNIT, FILES = 60, 60, 4
CHAOS_UNITS, KILLS = 480, 50
BOUND = 1e-5
PART = UNITS // 4
"""Commits after which a job is disturbed."""

HOOKED = (
    "import ray, sys; ray.init(runtime_env={'worker_process_setup_hook': 'tests.pipeline.poison.install', 'env_vars': {'PYTHONPATH': %r, %r: %r}}, "
    "log_to_driver=False, logging_level='ERROR'); from llmemb_ray.cli import main; sys.exit(main(sys.argv[1:]))"
)
"""The command, in whose workers the engines know poison."""

LATE_SECONDS = 20.0
"""A shard that appears so long after another attempt at its unit was committed cannot have been begun before."""


@dataclass
class Seen:
    """What storage shows while a job runs."""

    commits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Unit -> attempt -> when its commit was first seen."""
    shards: dict[str, float] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    """Attempts begun although a commit of their unit was visible."""

    def look(self, out: Path) -> None:
        now = time.time()
        for path in (out / "data").glob("*.parquet"):
            unit, attempt = path.stem.rsplit("-", 1)
            if path.name not in self.shards:
                self.shards[path.name] = now
                if any(other != attempt and now - when > LATE_SECONDS for other, when in self.commits.get(unit, {}).items()):
                    self.repeated.append(path.stem)
        for path in (out / "_llmemb" / "commits").glob("*.json"):
            with suppress(ValueError, KeyError, FileNotFoundError):  # Being written, or compacted away, at this moment.
                record = json.loads(path.read_text())
                known = self.commits.setdefault(path.stem, {})
                if record["attempt"] not in known:
                    began = record["finished"] - record["seconds_model"] - record["seconds_wait"] - record["seconds_write"]
                    if any(when < began for when in known.values()):
                        self.repeated.append(f"{path.stem}-{record['attempt']}")
                    known[record["attempt"]] = now


class Bench:
    """Server, model, corpora, cluster, and the result that every job must have."""

    def __init__(self, directory: Path, network: Network, seed: int, kills: int) -> None:
        self.directory, self.network, self.seed, self.kills = directory, network, seed, kills
        self.server = S3Server(directory / "s3", network.s3)
        self.server.root.mkdir()
        self.server.start()
        self.server.make_bucket("faults")
        self.model = make_model(directory / "model")
        self.cluster = Cluster(network, ENVIRONMENT | self.server.environment)
        self.expected: dict[str, Any] = {}
        self.drivers: list[subprocess.Popen[bytes]] = []

    def corpus(self, name: str, units: int, *, poison: bool = False) -> None:
        """Texts of some thirty words, one bad row in a thousand; poison: one that kills its engine."""
        if self.server.path(name).exists():
            return
        self.server.path(name).mkdir()
        rows = units * ROWS_PER_UNIT
        for file in range(FILES):
            numbers = range(file * rows // FILES, (file + 1) * rows // FILES)
            texts = [None if number % 997 == 5 else f"document {number} " + f"speaks of {number % 7} things and of more " * 3 for number in numbers]
            if poison and file == 1:
                texts[7] = POISON
            pq.write_table(pa.table({"id": list(numbers), "text": texts}), self.server.path(f"{name}/{file}.parquet"), row_group_size=5 * ROWS_PER_UNIT)

    def reference(self, corpus: str) -> tuple[Any, dict[int, np.ndarray]]:
        """(receipt, vectors) of the same job in this process, by the plain backend."""
        if corpus not in self.expected:
            given = {"input": [self.server.url(corpus)], "output": self.server.url(f"plain-{corpus}"), "model": str(self.model), "actors": "0", "backend": "hf"}
            access = {"endpoint_url": self.server.endpoint_url, "storage_options": self.server.storage_options}
            receipt = job.run(EmbedSettings.make(given | access | {"rows_per_unit": ROWS_PER_UNIT}), quiet=True)
            self.expected[corpus] = receipt, read(self.server, f"plain-{corpus}")[1]
        return self.expected[corpus]  # type: ignore[no-any-return]

    def end_drivers(self) -> None:
        """Of a job that failed."""
        for process in self.drivers:
            process.kill()
            process.wait()
        self.drivers.clear()

    def close(self) -> None:
        self.end_drivers()
        self.cluster.stop()
        self.server.kill()


class Job:
    """``llmemb embed`` on the cluster, started again where a fault ends it."""

    def __init__(self, bench: Bench, name: str, *extra: str, corpus: str = "corpus", hang: str = "", hooked: bool = False) -> None:
        self.bench, self.name, self.extra, self.corpus = bench, name, extra, corpus
        self.program = ["-c", HOOKED % (str(ROOT), HANG_FILE, hang)] if hooked else ["-m", "llmemb_ray.cli"]
        self.endpoint = bench.server.endpoint_url
        self.out = bench.server.path(name)
        self.seen = Seen()
        self.words: list[str] = []
        """What drivers said at their ends."""
        self.codes: list[int] = []
        self.started = time.monotonic()
        self.drivers: list[subprocess.Popen[bytes]] = []

    @property
    def driver(self) -> subprocess.Popen[bytes]:
        return self.drivers[-1]

    def start(self) -> None:
        server = self.bench.server
        command = [sys.executable, *self.program, "embed", server.url(self.corpus), server.url(self.name), "--model", str(self.bench.model), "--actors", "2"]
        command += ["--cpus-per-actor", "1", "--endpoint-url", self.endpoint, "--rows-per-unit", str(ROWS_PER_UNIT), *self.extra]
        environment = ENVIRONMENT | server.environment | {"RAY_ADDRESS": self.bench.cluster.address, "HF_HUB_OFFLINE": "1"}
        log = self.bench.directory / f"{self.name}-{len(self.drivers)}.log"
        with log.open("wb") as stream:
            self.drivers.append(subprocess.Popen(command, env=environment, cwd=self.bench.directory, stdout=stream, stderr=subprocess.STDOUT))
        self.bench.drivers.append(self.driver)

    def until(self, ready: Callable[[], bool], seconds: float = 420) -> None:
        """Watches storage until something holds, or the driver ends."""
        deadline = time.monotonic() + seconds
        while not ready() and self.driver.poll() is None:
            self.seen.look(self.out)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no end after {seconds:.0f} s, {len(self.seen.commits)} units committed: {self.said()}")
            time.sleep(0.1)

    def committed(self, count: int) -> Callable[[], bool]:
        return lambda: len(self.seen.commits) >= count

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)

    def end(self) -> int:
        """Waits for the driver's end."""
        self.until(lambda: False)
        self.codes.append(self.driver.returncode)
        self.words.append(self.said())
        return self.codes[-1]

    def said(self, number: int = -1) -> str:
        """The last that a driver said; number: of the start, default the last."""
        lines = (self.bench.directory / f"{self.name}-{number % len(self.drivers)}.log").read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("llmemb: ", "Traceback")) or "Error" in line]
        return (told or lines or [""])[-1][:300]

    def finish(self, starts: int = 3) -> None:
        """To the end, by the same command again where a driver fails."""
        while self.end():
            if len(self.drivers) > starts:
                raise RuntimeError(f"{self.name}: {self.words}")
            self.start()

    def assert_as_undisturbed(self, lost: int = 0) -> None:
        """lost: rows that only this job rejects."""
        receipt, expected = self.bench.reference(self.corpus)
        run, found = read(self.bench.server, self.name)
        assert verify(run, against=[self.bench.server.url(self.corpus)]).problems == []
        assert run.receipt is not None
        assert found.keys() <= expected.keys()
        assert len(expected) - len(found) == lost, f"{len(expected) - len(found)} ids are missing"
        assert max(float(np.abs(found[key] - expected[key]).max()) for key in found) <= BOUND
        assert (run.receipt.rows_read, run.receipt.units) == (receipt.rows_read, receipt.units)
        assert (run.receipt.rows_embedded, run.receipt.rows_rejected) == (receipt.rows_embedded - lost, receipt.rows_rejected + lost)
        assert self.seen.repeated == [], "attempts at units whose commit was visible"


# -- the faults -----------------------------------------------------------------------------------------

Fault = Callable[["Bench"], Job]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    """A function that runs a job to its end and disturbs it on the way; its docstring says by what."""
    FAULTS[function.__name__] = function
    return function


def begun(bench: Bench, name: str, *extra: str, **more: Any) -> Job:
    """A job that has made a quarter of its units."""
    made = Job(bench, name, *extra, **more)
    made.start()
    made.until(made.committed(PART))
    assert made.driver.poll() is None, made.said()
    return made


@fault
def undisturbed(bench: Bench) -> Job:
    """nothing"""
    made = begun(bench, "undisturbed")
    made.finish(starts=1)
    return made


@fault
def actor(bench: Bench) -> Job:
    """SIGKILL of an embedder actor"""
    made = begun(bench, "actor")
    bench.cluster.processes("EmbedUnits")[0].kill()
    made.finish(starts=1)
    return made


@fault
def node(bench: Bench) -> Job:
    """SIGKILL of a raylet with its workers; a new node after 15 s"""
    made = begun(bench, "node")
    bench.cluster.kill_node(0)
    made.pause(15)
    bench.cluster.start_node(0)
    made.finish(starts=1)
    return made


@fault
def node_gone(bench: Bench) -> Job:
    """SIGKILL of a raylet with its workers; no node takes its place"""
    made = begun(bench, "node_gone")
    bench.cluster.kill_node(0)
    made.finish(starts=1)
    bench.cluster.start_node(0)
    return made


@fault
def node_notice(bench: Bench) -> Job:
    """SIGTERM to `ray start` of a node (30 s of draining); a new node after 40 s"""
    made = begun(bench, "node_notice")
    bench.cluster.nodes[0].terminate()
    made.pause(40)
    bench.cluster.kill_node(0)
    bench.cluster.start_node(0)
    made.finish(starts=1)
    return made


@fault
def actor_notice(bench: Bench) -> Job:
    """SIGTERM to an embedder actor"""
    made = begun(bench, "actor_notice")
    bench.cluster.processes("EmbedUnits")[0].terminate()
    made.finish(starts=1)
    return made


@fault
def driver(bench: Bench) -> Job:
    """SIGKILL of the driver; the same command again"""
    made = begun(bench, "driver")
    made.driver.kill()
    made.finish()
    return made


@fault
def driver_notice(bench: Bench) -> Job:
    """SIGTERM to the driver (grace 30 s); the same command again"""
    made = begun(bench, "driver_notice", "--stop-grace", "30")
    made.driver.terminate()
    code = made.end()
    assert code == 1, made.words
    log = (bench.directory / f"{made.name}-0.log").read_text()
    assert "stopped because SIGTERM came" in log, log[-2000:]
    made.start()
    made.finish()
    return made


@fault
def cluster_head(bench: Bench) -> Job:
    """SIGKILL of the head and the driver on it; the whole cluster starts again, the same command again"""
    made = begun(bench, "cluster_head")
    bench.cluster.kill_head()
    made.driver.kill()
    bench.cluster.stop()
    bench.cluster.start()
    made.finish()
    return made


@fault
def storage(bench: Bench) -> Job:
    """SIGKILL of the S3 server, back after 30 s"""
    made = begun(bench, "storage")
    bench.server.kill()
    made.pause(30)
    assert made.driver.poll() is None, made.said()
    bench.server.start()
    made.finish(starts=1)
    return made


@fault
def cut_from_head(bench: Bench) -> Job:
    """nothing that a node sends reaches the head for 60 s"""
    made = begun(bench, "cut_from_head")
    with bench.network.cut(0, bench.network.head):
        made.pause(60)
    bench.cluster.kill_node(0)  # The head has written it off, and it ends itself; an operator starts it again.
    bench.cluster.start_node(0)
    made.finish()
    return made


@fault
def short_cut_from_head(bench: Bench) -> Job:
    """nothing that a node sends reaches the head for 8 s"""
    made = begun(bench, "short_cut_from_head")
    with bench.network.cut(0, bench.network.head):
        made.pause(8)
    made.finish()
    return made


@fault
def cut_from_storage(bench: Bench) -> Job:
    """nothing that a node sends reaches S3 for 30 s"""
    made = begun(bench, "cut_from_storage")
    with bench.network.cut(0, bench.network.s3):
        made.pause(30)
    made.finish(starts=1)
    return made


@fault
def throttled(bench: Bench) -> Job:
    """S3 answers 503 to 20 % of requests, and 2 % after 5 s"""
    made = Job(bench, "throttled")
    with closing_proxy(BadDay(bench.server.port, refused=0.2, cut=0.0, slow=0.02, slow_seconds=5.0, host=bench.network.s3)) as proxy:
        made.endpoint = proxy.endpoint_url
        made.start()
        made.finish(starts=1)
        assert proxy.counts["refused"] > 50, proxy.counts
        assert proxy.counts["slow"] > 0, proxy.counts
    return made


@contextmanager
def closing_proxy(proxy: BadDay) -> Iterator[BadDay]:
    try:
        yield proxy
    finally:
        proxy.stop()


@fault
def poison(bench: Bench) -> Job:
    """a row that kills every engine that computes it"""
    made = begun(bench, "poison", corpus="poisoned", hooked=True)
    made.finish(starts=1)
    return made


@fault
def hang(bench: Bench) -> Job:
    """an actor's engine hangs for ever (stall_timeout 10 s)"""
    file = bench.directory / "hang"
    made = begun(bench, "hang", "--stall-timeout", "10", hooked=True, hang=str(file))
    file.touch()
    made.finish(starts=1)
    assert not file.exists(), "nobody hung"
    return made


@fault
def frozen(bench: Bench) -> Job:
    """SIGSTOP of an embedder actor, which never goes on (stall_timeout 10 s)"""
    made = begun(bench, "frozen", "--stall-timeout", "10", "--storage-retry-seconds", "5")
    bench.cluster.processes("EmbedUnits")[0].suspend()
    made.finish(starts=1)
    return made


@fault
def spilling(bench: Bench) -> Job:
    """object stores of 80 MB are filled by another program, the disk for spilling (4 MB) is full, for 20 s"""
    disk = bench.directory / "spill"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=True)
    bench.cluster.stop()
    bench.cluster.start(f"--object-spilling-directory={disk}", store=80_000_000)
    try:
        made = begun(bench, "spilling")
        program = [sys.executable, str(Path(__file__).with_name("fault_cluster.py")), "fill", bench.cluster.address, "20"]
        filled = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert "filled" in filled.stdout, filled.stderr[-2000:]
        made.finish()
    finally:
        bench.cluster.stop()
        subprocess.run(["umount", "-l", str(disk)], check=True)
        bench.cluster.start()
    return made


@fault
def two_drivers(bench: Bench) -> Job:
    """two drivers started on one output at the same time"""
    made = Job(bench, "two_drivers")
    made.start()
    made.start()
    first, second = made.drivers
    while first.poll() is None or second.poll() is None:
        made.seen.look(made.out)
        time.sleep(0.1)
    made.codes = [first.returncode, second.returncode]
    made.words = [made.said(number) for number in range(2)]
    assert 0 in made.codes, made.codes
    return made


@fault
def chaos(bench: Bench) -> Job:
    """fifty random kills in a row: of actors, workers that read, nodes, the driver, the S3 server"""
    made = Job(bench, "chaos", corpus="long")
    made.start()
    chance = random.Random(bench.seed)
    kills: list[str] = []
    while len(kills) < bench.kills:
        made.until(made.committed(len(made.seen.commits) + 1))  # A kill disturbs something only where work is going on.
        made.pause(chance.uniform(0.0, 4.0))
        if made.driver.poll() is not None:
            if made.end() == 0:
                break
            made.start()
            continue
        kills.append(kill_one(bench, made, chance))
        print(f"  kill {len(kills)}: {kills[-1]}, {len(made.seen.commits)} units committed", flush=True)
    assert len(kills) == bench.kills, f"the job was done after {len(kills)} kills: {made.words}"
    made.finish(starts=bench.kills + 1)
    made.words.append(", ".join(f"{kills.count(name)} {name}" for name in sorted(set(kills))))
    return made


def kill_one(bench: Bench, made: Job, chance: random.Random) -> str:
    target = chance.choices(["actor", "reader", "node", "driver", "storage"], [4, 3, 1, 1, 2])[0]
    wait = chance.uniform(0.5, 5.0)
    if target in ("actor", "reader"):
        found = bench.cluster.processes("EmbedUnits" if target == "actor" else "read_and_tokenize")
        if not found:
            return kill_one(bench, made, chance)
        with suppress(psutil.NoSuchProcess):
            chance.choice(found).kill()
    elif target == "node":
        number = chance.randrange(len(bench.cluster.nodes))
        bench.cluster.kill_node(number)
        made.pause(wait)
        bench.cluster.start_node(number)
    elif target == "driver":
        made.driver.kill()
        made.end()
        made.start()
    else:
        bench.server.kill()
        made.pause(wait)
        bench.server.start()
    return target


# -- running them ----------------------------------------------------------------------------------------


def run(bench: Bench, name: str, undisturbed_seconds: float | None) -> dict[str, Any]:
    bench.cluster.complete()
    if not bench.server.running:
        bench.server.start()
    record: dict[str, Any] = {"fault": name, "what": (FAULTS[name].__doc__ or "").strip(), "outcome": "as undisturbed"}
    began = time.monotonic()
    try:
        made = FAULTS[name](bench)
        record |= {"seconds": round(time.monotonic() - made.started, 1), "load": round(os.getloadavg()[1], 1)}
        made.assert_as_undisturbed(lost=int(name == "poison"))
        record |= {"exit_codes": made.codes, "units": len(made.seen.commits), "attempts_seen": len(made.seen.shards)}
        if name == "chaos":
            record["kills"] = made.words[-1]
        elif any(made.codes):
            record["said"] = [words for words, code in zip(made.words, made.codes, strict=False) if code > 0]
    except (AssertionError, RuntimeError, subprocess.CalledProcessError) as error:
        record |= {"outcome": f"FAILED: {error}"[:1500], "seconds": round(time.monotonic() - began, 1)}
    bench.end_drivers()
    if undisturbed_seconds is not None and name not in ("undisturbed", "chaos"):
        record |= {"seconds_undisturbed": undisturbed_seconds, "seconds_lost": round(record["seconds"] - undisturbed_seconds, 1)}
    print(json.dumps(record), flush=True)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FAULTS), action="append", help="run this one; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the chaos run")
    parser.add_argument("--kills", type=int, default=KILLS, help="of the chaos run")
    parser.add_argument("--keep", action="store_true", help="keep the directory with logs and outputs")
    arguments = parser.parse_args()
    wanted = arguments.only or list(FAULTS)
    directory = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))
    path = RECORDS / "faults.json"
    records = {record["fault"]: record for record in json.loads(path.read_text())["records"]} if path.exists() else {}
    with Network.open() as network, closing(Bench(directory, network, arguments.seed, arguments.kills)) as bench:
        for corpus, units in {"corpus": UNITS, "poisoned": UNITS, "long": CHAOS_UNITS}.items():  # All at once: the server remembers for minutes what it listed.
            bench.corpus(corpus, units, poison=corpus == "poisoned")
        bench.reference("corpus")
        quiet: float | None = records.get("undisturbed", {}).get("seconds")
        for name in sorted(wanted, key=lambda name: (name != "undisturbed", name == "chaos")):
            if name.endswith(("cut_from_head", "cut_from_storage")) and not network.separate:
                print(f"{name}: left out, network namespaces need root", flush=True)
                continue
            records[name] = run(bench, name, quiet) | {"date": time.strftime("%Y-%m-%d"), "seed": arguments.seed}
            quiet = records[name]["seconds"] if name == "undisturbed" else quiet
            ordered = [records[name] for name in FAULTS if name in records]
            path.write_text(json.dumps(head() | {"namespaces": network.separate, "records": ordered}, indent=1, ensure_ascii=False) + "\n")
    if not arguments.keep:
        shutil.rmtree(directory, ignore_errors=True)
    return int(any(records[name]["outcome"] != "as undisturbed" for name in wanted if name in records))


if __name__ == "__main__":
    sys.exit(main())
