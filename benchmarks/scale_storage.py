"""Planning many files, resuming with many commits, and what a run asks of S3."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.scale_jobs import LINKS, abstracts, events_of, make_config, make_corpus, run_job
from benchmarks.scale_standin import LOG, RATE, REQUESTS, ROOT
from tests.s3_server import S3Server


def planning(scratch: Path, *, files: int, s3: bool = False) -> dict[str, Any]:
    """Files of one row group; this process plans, in one that was made for it."""
    model = make_config(scratch / "model", 128)
    corpus = make_corpus(scratch / "s3/bucket/corpus" if s3 else scratch / "corpus", files, 2, 2, ["one short text"])
    if not s3:
        return _planned([str(corpus)], scratch, model, {})
    server = S3Server(scratch / "s3")
    server.start()
    try:
        return _planned([server.url("corpus")], scratch, model, {"endpoint_url": server.endpoint_url, "storage_options": server.storage_options})
    finally:
        server.kill()


def _planned(inputs: list[str], scratch: Path, model: Path, access: dict[str, Any]) -> dict[str, Any]:
    code = "import json, sys; from benchmarks import scale_storage as scale; print(json.dumps(scale.plan_here(*json.loads(sys.argv[1]))))"
    asked = json.dumps([inputs, str(scratch / "out"), str(model), access])
    environment = os.environ | {"PYTHONPATH": str(ROOT), LOG: str(scratch), REQUESTS: "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code, asked], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    operations = requests_in(scratch)
    return json.loads(done.stdout) | {"requests": operations}  # type: ignore[no-any-return]


def requests_in(directory: Path) -> dict[str, int]:
    """Requests by operation and what they are about."""
    return dict(sorted(Counter(event[1].removeprefix("s3:") for event in events_of(directory) if event[1].startswith("s3:")).items()))


def plan_here(inputs: list[str], out: str, model: str, access: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.scale_standin import count_requests
    from llmemb_ray.config import EmbedSettings
    from llmemb_ray.embedders.embedder import settle
    from llmemb_ray.pipeline import planning as project
    from llmemb_ray.shards.plan import Plan
    from llmemb_ray.storage import Storage

    count_requests()
    settings = EmbedSettings.make({"input": inputs, "output": out, "model": model} | access)
    spec = settle(settings)
    marks = [(time.monotonic(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)]

    def mark() -> None:
        marks.append((time.monotonic(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    found, selection = project.find(settings)
    mark()
    made = project.make_plan(settings, spec, found, selection, actors=1, gpu=False)
    mark()
    made.save(Storage(out))
    mark()
    loaded = Plan.load(Storage(out))
    mark()
    assert loaded is not None
    names = ("list", "footers_and_units", "save", "load")
    pairs = list(zip(names, marks[:-1], marks[1:], strict=True))
    return {
        "files": len(found),
        "units": sum(1 for _ in loaded.units()),
        "seconds_of_the_clock": {name: round(after[0] - before[0], 2) for name, before, after in pairs},
        "cpu_seconds": {name: round(after[1] - before[1], 2) for name, before, after in pairs},
        "mb_before": round(marks[0][2]),
        "mb_more_at_the_peak": {name: round(after[2] - marks[0][2]) for name, _, after in pairs},
        "plan_bytes": sum(entry.size for entry in Storage(out).list()),
    }


# -- resuming --------------------------------------------------------------------------------------


def resume(scratch: Path, *, commits: int, left: int = 20) -> dict[str, Any]:
    """A run of which all but ``left`` units are committed: commits by the project's own writer, shards as hard links to one."""
    from llmemb_ray.config import EmbedSettings
    from llmemb_ray.pipeline import opening
    from llmemb_ray.shards import commits as records
    from llmemb_ray.shards.commits import Commit

    model, out = make_config(scratch / "model", 128), scratch / "out"
    corpus = make_corpus(scratch / "corpus", 1, commits + left, 1000, ["one short text"])
    given = {"input": [str(corpus)], "output": str(out), "model": str(model), "prompt": "none", "backend": "hf", "actors": "1", "gpus_per_actor": 1}
    settings = EmbedSettings.make(given | {"rows_per_unit": 1})
    prospect = opening.look(settings)
    prospect = replace(prospect, spec=prospect.spec.on(gpu=True))
    plan, _ = opening.plan_of(settings, prospect, actors=1, gpu=True, say=print)
    (out / "data").mkdir()
    ones = [out / f"one-{number}.parquet" for number in range(commits // LINKS + 1)]
    for one in ones:
        one.write_bytes(b"PAR1" * 500)

    def commit(unit: Any) -> None:
        shard = f"data/{unit.name}-{unit.start:012x}.parquet"
        os.link(ones[unit.start // LINKS], out / shard)
        here = {"file": unit.file, "start": unit.start, "rows": 1, "embedded": 1, "rejected": 0, "vectors": 1, "tokens": 4, "tokens_computed": 4}
        record = Commit(unit=unit.name, attempt=f"{unit.start:012x}", shard=shard, shard_bytes=2000, shard_sha256="0" * 64, **here, backend="hf", host="host")
        records.write(prospect.output, record)

    units = list(plan.units())
    with ThreadPoolExecutor(8) as pool:
        _ = list(pool.map(commit, units[:commits]))
    for one in ones:
        one.unlink()
    began = time.time()
    ran = run_job(scratch, str(corpus), str(out), model, "--rows-per-unit", "1", actors=1, rate=0)
    first = next(event[0] for event in ran.events if event[1] == "engine")
    last = max(event[0] for event in ran.events if event[1] == "commit")
    before = [look for look in ran.looks if look.time <= first]
    after = [look for look in ran.looks if look.time >= last]
    empty = _fresh(scratch, model)
    return {
        "commits": commits,
        "left": left,
        "seconds_to_the_first_unit": round(first - began, 1),
        "driver_cpu_seconds_to_the_first_unit": round(before[-1].cpu["driver"], 1),
        "driver_mb_to_the_first_unit": round(max(look.mb["driver"] for look in before)),
        "of_a_new_run": empty,
        "finish_seconds_of_the_clock": round(after[-1].time - last, 1),
        "finish_driver_cpu_seconds": round(after[-1].cpu["driver"] - before[-1].cpu["driver"], 1),
        "finish_driver_mb": round(max(look.mb["driver"] for look in after)),
        "receipt": (out / "_llmemb/receipt.json").exists(),
    }


def _fresh(scratch: Path, model: Path) -> dict[str, Any]:
    """The same of a run of twenty units without commits."""
    corpus = make_corpus(scratch / "small", 1, 20, 20, ["one short text"])
    began = time.time()
    ran = run_job(scratch, str(corpus), str(scratch / "out-small"), model, "--rows-per-unit", "1", actors=1, rate=0)
    first = next(event[0] for event in ran.events if event[1] == "engine")
    before = [look for look in ran.looks if look.time <= first]
    return {
        "seconds_to_the_first_unit": round(first - began, 1),
        "driver_cpu_seconds_to_the_first_unit": round(before[-1].cpu["driver"], 1),
        "driver_mb_to_the_first_unit": round(max(look.mb["driver"] for look in before)),
    }


# -- requests --------------------------------------------------------------------------------------


def requests(scratch: Path, *, files: int = 4, groups: int = 3, units_in_group: int = 5) -> dict[str, Any]:
    """What a run in one process asks of a real S3 server, by operation and what it is about. Two runs: of a unit, and of a row group, it is the difference."""
    return {
        "runs": [
            _asked(scratch / str(number), files, many, units)
            for number, (many, units) in enumerate([(groups, units_in_group), (groups, 2 * units_in_group), (2 * groups, units_in_group)])
        ]
    }


def _asked(scratch: Path, files: int, groups: int, units_in_group: int) -> dict[str, Any]:
    model = make_config(scratch / "model", 128)
    make_corpus(scratch / "s3/bucket/corpus", files, groups * units_in_group * 20, units_in_group * 20, abstracts())
    (scratch / "log").mkdir()
    server = S3Server(scratch / "s3")
    server.start()
    try:
        given = {"input": [server.url("corpus")], "output": server.url("out"), "model": str(model), "actors": "0", "backend": "hf", "prompt": "none"}
        asked = json.dumps(given | {"rows_per_unit": 20, "endpoint_url": server.endpoint_url, "storage_options": server.storage_options})
        environment = os.environ | {"PYTHONPATH": str(ROOT), LOG: str(scratch / "log"), REQUESTS: "1", RATE: "0"}
        code = "import sys; from benchmarks import scale_storage as scale; scale.embed_here(sys.argv[1])"
        subprocess.run([sys.executable, "-P", "-c", code, asked], env=environment, check=True)
    finally:
        server.kill()
    found = requests_in(scratch / "log")
    return {"files": files, "row_groups": files * groups, "units": files * groups * units_in_group, "requests": found}


def embed_here(settings: str) -> None:
    from benchmarks.scale_standin import install
    from llmemb_ray.config import EmbedSettings
    from llmemb_ray.pipeline import job

    install()
    job.run(EmbedSettings.make(json.loads(settings)), quiet=True)
