"""How far one head reaches: the driver, planning, resuming, and how many GPUs reading, tokenising and scheduling keep busy. GPUs are played by a stand-in.

    python benchmarks/scale.py                          all parts, one after the other
    python benchmarks/scale.py --only driver busy-8     those whose names begin with these words
    python benchmarks/scale.py --missing                those that the record lacks
    python benchmarks/scale.py --page                   write docs/scale.md from the record and the stated assumptions

Each part replaces itself in records/scale.json as soon as it is done. The machine is shared with other work, so what counts are processor seconds, not
seconds of the clock; ``load`` is the mean of processes that wanted to run, over the minute before. Only the engine is a stand-in (``scale_standin``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.memory import RECORDS, head
from benchmarks.scale_jobs import CORES, abstracts, events_of, make_config, make_corpus, run_job
from benchmarks.scale_storage import planning, requests, resume
from benchmarks.scale_watch import Watch, peaks, rounded, slope, spent

RECORD = RECORDS / "scale.json"
GPU_TOKENS_PER_S = 20_000
"""Of an actor that is played: about a 7B model on an H100 at 30 % of its rate."""
UNIT_SECONDS = 6
"""Of such an actor: a tenth of the minute that units are planned for, so that a part takes a minute; what a unit costs then weighs ten times as much."""
SETTLE_SECONDS, MEASURE_SECONDS = 12, 45


# -- the driver ------------------------------------------------------------------------------------


def driver(scratch: Path, *, units: int, window: int | None = None, actors: int = 2, per_group: int = 10) -> dict[str, Any]:
    """Units of one row that take no time: what is left is what a unit costs. per_group: units in a row group, so in a reading task."""
    model = make_config(scratch / "model", 128)
    corpus = make_corpus(scratch / "corpus", 1, units, per_group, ["one short text"])
    more = ["--rows-per-unit", "1", *(["--window-units", str(window)] if window else [])]
    ran = run_job(scratch, str(corpus), str(scratch / "out"), model, *more, actors=actors, rate=0)
    size = window or 4000
    looks = [look for look in ran.looks if look.units]
    by_window = {number: [look for look in looks if look.units // size == number and look.units < units] for number in range(-(-units // size))}
    slopes = {number: slope([(look.units, look.mb["driver"]) for look in group]) * 1024 for number, group in by_window.items() if len(group) >= 5}
    steady = [look for look in looks if 0.1 * units <= look.units <= 0.9 * units]
    done, cpu = steady[-1].units - steady[0].units, spent(steady[0], steady[-1])
    loads = [event for event in ran.events if event[1] == "load"]
    return {
        "units": units,
        "window_units": size,
        "actors": actors,
        "units_in_a_reading_task": per_group,
        "seconds_of_the_clock": round(ran.seconds, 1),
        "units_per_second": round(done / (steady[-1].time - steady[0].time), 2),
        "cpu_ms_per_unit": {role: round(1000 * seconds / done, 2) for role, seconds in sorted(cpu.items())},
        "models_loaded": len(loads),
        "driver_mb_first": round(looks[0].mb["driver"], 1),
        "driver_mb_most_by_window": [round(max(look.mb["driver"] for look in group), 1) for group in by_window.values() if group],
        "driver_kb_per_unit_by_window": [round(value, 1) for value in slopes.values()],
        "peak_mb": peaks(ran.looks),
    }


# -- how many GPUs ---------------------------------------------------------------------------------


def busy(scratch: Path, *, actors: int, dimension: int = 4096, rate: int = GPU_TOKENS_PER_S) -> dict[str, Any]:
    """Actors of ``rate`` tokens a second on this machine's cores: the share of the time that they compute, and what each part of the work takes.

    Readers run ahead of the actors: what they take is of the tokens that they prepared.
    """
    model = make_config(scratch / "model", dimension)
    per_unit = rate * UNIT_SECONDS // 100
    corpus = make_corpus(scratch / "corpus", 64, 10 * per_unit, 5 * per_unit, abstracts())
    since: list[float] = []

    def until(watch: Watch, log: Path) -> bool:
        if not since and sum(event[1] == "load" for event in events_of(log)) >= actors and any(event[1] == "engine" for event in events_of(log)):
            since.append(time.time() + SETTLE_SECONDS)
            psutil.cpu_percent()
        return bool(since) and time.time() > since[0] + MEASURE_SECONDS

    ran = run_job(scratch, str(corpus), str(scratch / "out"), model, "--rows-per-unit", str(per_unit), actors=actors, rate=rate, until=until)
    machine = psutil.cpu_percent() / 100
    start, end = since[0], since[0] + MEASURE_SECONDS
    looks = [look for look in ran.looks if start <= look.time <= end]
    spans = [(event[0] - event[3] / rate, event[0], event[3]) for event in ran.events if event[1] == "engine"]
    computed = sum(max(0.0, min(end, last) - max(start, first)) for first, last, _ in spans)
    tokens = computed * rate
    cpu = spent(looks[0], looks[-1])
    inside = [event for event in ran.events if start <= event[0] <= end]
    prepared = sum(event[1] == "tokenise" for event in inside)
    written = sum(event[1] == "write" for event in inside)
    unit_tokens = sum(span[2] for span in spans) / len(spans)
    parts = {name: sum(event[2] for event in inside if event[1] == name) for name in ("read", "tokenise", "engine", "check", "encode", "write", "commit")}
    of = {"read": prepared, "tokenise": prepared} | dict.fromkeys(("engine", "check", "encode", "write", "commit"), written)
    return {
        "actors": actors,
        "tokens_per_s_of_an_actor": rate,
        "dimension": dimension,
        "rows_per_unit": per_unit,
        "tokens_per_unit": round(unit_tokens),
        "measured_seconds": MEASURE_SECONDS,
        "busy_share": round(computed / (actors * MEASURE_SECONDS), 4),
        "tokens_per_s": round(tokens / MEASURE_SECONDS),
        "cpu_seconds": rounded(cpu, 2),
        "cores_of_this_job": round(sum(cpu.values()) / (looks[-1].time - looks[0].time), 2),
        "cores_of_the_machine_used_by_all": round(machine * CORES, 2),
        "units_prepared": prepared,
        "units_computed": round(tokens / unit_tokens, 1),
        "cpu_seconds_per_million_tokens": {
            name: round(1e6 * seconds / (prepared * unit_tokens if name == "readers" else tokens), 4) for name, seconds in sorted(cpu.items()) if tokens
        },
        "cpu_seconds_per_million_tokens_of": {name: round(1e6 * seconds / (of[name] * unit_tokens), 4) for name, seconds in parts.items() if of[name]},
        "peak_mb": peaks(ran.looks),
    }


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "driver-1000": lambda scratch: driver(scratch, units=1000),
    "driver-10000": lambda scratch: driver(scratch, units=10_000),
    "driver-window-250": lambda scratch: driver(scratch, units=1000, window=250),
    "driver-actors-16": lambda scratch: driver(scratch, units=1000, actors=16),
    "planning-100000": lambda scratch: planning(scratch, files=100_000),
    "planning-s3-10000": lambda scratch: planning(scratch, files=10_000, s3=True),
    "resume-10000": lambda scratch: resume(scratch, commits=10_000),
    "resume-100000": lambda scratch: resume(scratch, commits=100_000),
    "requests": requests,
    **{f"busy-{actors}": lambda scratch, actors=actors: busy(scratch, actors=actors) for actors in (2, 4, 8, 16, 32)},  # type: ignore[misc]
    "busy-1024-dimensions": lambda scratch: busy(scratch, actors=4, dimension=1024),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"parts whose names begin with these words: {', '.join(PARTS)}")
    parser.add_argument("--missing", action="store_true", help="only parts that the record lacks")
    parser.add_argument("--page", action="store_true", help="write docs/scale.md")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"parts": {}}
    if arguments.page:
        from benchmarks import scale_page

        scale_page.write(record)
        return
    for name, part in PARTS.items():
        chosen = not arguments.only or any(name == asked or name.startswith(f"{asked}-") for asked in arguments.only)
        if not chosen or (arguments.missing and name in record["parts"]):
            continue
        scratch = Path(tempfile.mkdtemp(prefix="llmemb-scale-"))
        about = head() | {"command": f"python benchmarks/scale.py --only {name}", "directory": tempfile.gettempdir(), "load": round(os.getloadavg()[0], 2)}
        try:
            result = part(scratch)
        finally:
            shutil.rmtree(scratch)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {"parts": {}}
        record["parts"][name] = about | {"load_after": round(os.getloadavg()[0], 2)} | result
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
