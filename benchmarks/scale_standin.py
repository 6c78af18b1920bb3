"""GPUs that two cores can play: an engine that takes a set time a token, in the real job, and a log of what each part of it took.

Invariant: only the engine is replaced. It sleeps for as long as its tokens would take and returns vectors made of them; reading, tokenising,
encoding, writing, committing, the ledger and Ray are the real ones. Installed in Ray's workers by their setup hook.

    python benchmarks/scale_standin.py GPUS CPUS embed INPUT OUTPUT …      the command `llmemb`, on a Ray with so many GPUs in its books
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

RATE = "LLMEMB_SCALE_RATE"
"""Tokens a second of an actor; 0: its work takes no time."""
LOG = "LLMEMB_SCALE_LOG"
"""Directory of the log, a file a process: lines of [Unix time, what, seconds, amount]."""
REQUESTS = "LLMEMB_SCALE_REQUESTS"
"""Set: requests to S3 are logged too."""

PACK_TOKENS = 65_536
"""Tokens of a forward pass, after each of which the actor gives a sign, as with the real engine."""

STORE_BYTES = 2 * 10**9
TABLE_ROWS = 1024


class StandIn:
    """As ``llmemb_ray.embedders.embedder.Backend``. rate: tokens a second; 0 for an engine that takes no time."""

    name = "hf"
    token_budget = PACK_TOKENS

    def __init__(self, dimension: int, rate: float) -> None:
        import numpy as np

        self._rate = rate
        self._table_RD = np.random.default_rng(0).standard_normal((TABLE_ROWS, dimension), np.float32)

    def embed(self, rows: Any, prefix: Any = None, *, on_pack: Callable[[int, int], None] | None = None) -> Any:
        import numpy as np
        import torch

        from llmemb_ray.embedders.work import Pooled, Work

        began, cpu = time.monotonic(), time.thread_time()
        offsets, tokens = np.asarray(rows.offsets), int(rows.lengths.sum())
        ends = [*range(PACK_TOKENS, tokens, PACK_TOKENS), tokens]
        done_rows = done_tokens = 0
        for end in ends:
            if self._rate:
                time.sleep(max(0.0, began + end / self._rate - time.monotonic()))
            upto = int(np.searchsorted(offsets, end, "right")) - 1
            if on_pack is not None:
                on_pack(upto - done_rows, end - done_tokens)
            done_rows, done_tokens = upto, end
        sums = np.add.reduceat(rows.ids, offsets[:-1]) if len(rows) else np.zeros(0, np.int64)
        vectors = torch.from_numpy(self._table_RD[sums % TABLE_ROWS])
        log("engine", time.thread_time() - cpu, tokens)
        return Pooled(vectors, work=Work(tokens=tokens, computed=tokens, packs=len(ends)))

    def forget(self) -> None:
        """Keeps nothing."""


_lock = threading.Lock()
_files: dict[int, Any] = {}


def log(what: str, seconds: float, amount: int = 0) -> None:
    """A line of this process's file."""
    with _lock:
        file = _files.get(os.getpid())
        if file is None:
            file = _files[os.getpid()] = open(Path(os.environ[LOG]) / f"{os.getpid()}.jsonl", "a", buffering=1)  # noqa: SIM115 (open as long as the process)
        file.write(json.dumps([round(time.time(), 4), what, round(seconds, 6), amount]) + "\n")


def metered(what: str, plain: Any, clock: Callable[[], float] = time.thread_time) -> Any:
    """A function whose processor seconds are logged."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = clock()
        try:
            return plain(*args, **kwargs)
        finally:
            log(what, clock() - began)

    return call


def metered_steps(what: str, plain: Any) -> Any:
    """A generator whose processor seconds are logged step by step, those of Arrow's threads with them."""

    def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
        inner = plain(*args, **kwargs)
        while True:
            began = time.process_time()
            try:
                step = next(inner)
            except StopIteration:
                return
            finally:
                log(what, time.process_time() - began)
            yield step

    return steps


def install() -> None:
    """In a worker of Ray: the stand-in in place of the engine, meters around the other parts."""
    from llmemb_ray.embedders.embedder import Embedder
    from llmemb_ray.pipeline import attempt, prepare
    from llmemb_ray.shards import commits
    from llmemb_ray.shards.precision import Precision

    def load(self: Any, device: str | None, *, packed: bool | None) -> StandIn:
        log("load", 0.0)
        return StandIn(self.dimension, float(os.environ[RATE]))

    Embedder._transformers = load  # type: ignore[method-assign]
    prepare.read_units = metered_steps("read", prepare.read_units)
    prepare.prepare_unit = metered("tokenise", prepare.prepare_unit)
    attempt._write_shard = metered("write", attempt._write_shard)
    attempt.mean_cosine = metered("check", attempt.mean_cosine)
    attempt._unusable = metered("check", attempt._unusable)
    Precision.encode = metered("encode", Precision.encode)  # type: ignore[method-assign]
    commits.write = metered("commit", commits.write)  # type: ignore[method-assign]
    count_requests()


def count_requests() -> None:
    """Logs each request to S3 by its operation, where that was asked for."""
    if REQUESTS not in os.environ:
        return
    from aiobotocore.client import AioBaseClient

    plain = AioBaseClient._make_api_call

    async def call(self: Any, operation: str, arguments: Any) -> Any:
        log(f"s3:{operation} {about(arguments)}", 0.0)
        return await plain(self, operation, arguments)

    AioBaseClient._make_api_call = call


def about(arguments: Any) -> str:
    """What a request to S3 is about: the corpus, or the directory of OUT."""
    key = str(arguments.get("Key") or arguments.get("Prefix") or "")
    words = key.removesuffix("/").split("/")
    return words[0] if words[0] != "out" else "/".join(words[1:3] if words[1:2] == ["_llmemb"] else words[1:2]) or "out"


def main() -> int:
    import ray

    gpus, cpus = float(sys.argv[1]), float(sys.argv[2])
    environment = {"PYTHONPATH": str(ROOT)} | {name: os.environ[name] for name in (RATE, LOG, REQUESTS) if name in os.environ}
    count_requests()
    ray.init(
        address="local",
        num_gpus=gpus,
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": "benchmarks.scale_standin.install", "env_vars": environment},
    )
    try:
        from llmemb_ray.cli import main as llmemb

        return int(llmemb(sys.argv[3:]) or 0)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
