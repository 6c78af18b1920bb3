"""The sections of docs/scale.md. Knows no figures of its own: they come from the record, from ``scale_page.ASSUMED`` and from arithmetic of both."""

from __future__ import annotations

from typing import Any

from benchmarks.scale_page import (
    ASSUMED,
    BUSY,
    DAYS,
    DRIVER,
    DTYPES,
    PLANNING,
    RESUME,
    ROWS,
    TOKENS,
    Case,
    Head,
    assumptions,
    case,
    configs,
    count,
    money,
    near,
    per_request,
    span,
    table,
    wrapped,
)
from benchmarks.scale_watch import slope
from llmemb_ray.pipeline.estimates import gpus, text
from llmemb_ray.pipeline.estimates.estimate import UTILIZATION
from llmemb_ray.pipeline.job import UNITS_OF_AN_ACTOR, WINDOW_UNITS, window_units
from llmemb_ray.pipeline.planning import GPU_FLOPS

CHOSEN = "float16"


def page(parts: dict[str, Any]) -> str:
    cases = [case(name, config, rows, tokens, CHOSEN) for name, config in configs().items() for rows in ROWS for tokens in TOKENS]
    head = Head.of(parts)
    sections = [
        _intro(parts),
        _short(parts, cases, head),
        _hours(cases),
        _storage(),
        _requests(parts, cases),
        _head(parts, cases, head),
        _workers(parts, cases),
        _windows(parts, cases),
        assumptions(),
    ]
    return wrapped("\n".join(sections))


def _rows(rows: int) -> str:
    return f"10{'⁹' if rows == 10**9 else '¹¹'}"


def _intro(parts: dict[str, Any]) -> str:
    low, high = UTILIZATION
    dates = sorted({part["date"] for part in parts.values()})
    return f"""# A billion rows, and a hundred billion

What 10⁹ and 10¹¹ rows need, for models of 0.6, 7 and 66 billion parameters. This page is written by `python benchmarks/scale.py --page`; do not edit it.

Three kinds of figures stand here, and each says which it is:

- **measured**, on {parts[DRIVER]["machine"]}, {" to ".join(dict.fromkeys((dates[0], dates[-1])))}, with other work on the same cores:
`benchmarks/records/scale.json`, part in
  brackets, each made by `python benchmarks/scale.py --only PART`. GPUs were played by a stand-in that sleeps for the time that its tokens would
take; all else was the real
  job. Seconds are those of the processor, since the cores were shared;
- **assumed**, from [the last section](#what-is-assumed): above all that an {ASSUMED.gpu} reaches {low:.0%} to {high:.0%} of its dense bf16 rate,
which nobody has measured for this package;
- **reckoned** from both by the functions that `llmemb plan` uses. No run here had more than {count(parts[DRIVER]["units"])} units,
{count(parts[PLANNING]["files"])} files,
  {count(parts[RESUME]["commits"])} commits or {max(part["actors"] for part in parts.values() if "actors" in part)} actors: what lies beyond
is extrapolated in proportion, and whether it is in proportion was not seen.
"""


def _short(parts: dict[str, Any], cases: list[Case], head: Head) -> str:
    unit, group = per_request(parts)
    rows = []
    for one in cases:
        requests = _request_cost(one, unit, group)
        ends = [head.memory_gb(one, units)[1] for units in (one.units, one.fewest_units)]
        rows.append(
            f"{one.name} | {_rows(one.rows)} | {one.tokens} | {span(one.gpu_hours)} | {span(one.gpu_hours, one.gpu_price)} | "
            f"{one.actors_in(DAYS) * one.gpus_per_actor:,.1f} | {text.size(one.vector_bytes)} | {count(one.units)} / {count(one.fewest_units)} | "
            f"{money(requests)} | {ends[0]:,.1f} / {ends[1]:,.1f} | {_scheduling(one, head):.2g}"
        )
    header = f"model | rows | tokens a row | GPU hours | USD | GPUs for {DAYS} days | {CHOSEN} vectors | units | requests, USD | head, GB | head, cores"
    return f"""## In short

One {ASSUMED.gpu} or several at list price, prompts without a template, {CHOSEN} vectors. Units are those that the plan cuts by itself, and those of
`--rows-per-unit` with 128 MiB of vectors each (or a row group); "head, GB" is what the driver takes when it finishes a run of either; "head, cores"
what driver and Ray's own processes take of the head when the work is done in {DAYS} days by as many GPUs as the middle of the range needs.

{table(header, rows)}
A shared template costs nothing where its prefix is shared; where it is not, its tokens count like the text's. The same arithmetic for your own rows,
tokens and model: `llmemb plan`.
"""


def _scheduling(one: Case, head: Head) -> float:
    """Cores of the head: units a second times what one takes."""
    return _per_second(one) * (head.driver_ms_per_unit + head.gcs_raylet_ms_per_unit + head.ledger_ms_per_unit) / 1000


def _per_second(one: Case) -> float:
    """Units, when the work is done in ``DAYS``."""
    return one.units / (DAYS * 86400)


def _hours(cases: list[Case]) -> str:
    gpu = gpus.find(ASSUMED.gpu)
    rows = []
    for one in cases:
        nodes = max(1, -(-round(one.actors_in(DAYS) * one.gpus_per_actor + 0.5) // ASSUMED.node_gpus))
        each = one.flops / one.rows / one.tokens
        speed = [gpu.bf16 * share / each for share in UTILIZATION]
        rows.append(
            f"{one.name} | {_rows(one.rows)} | {one.tokens} | {one.flops:.2g} | {count(speed[0])} to {count(speed[1])} | "
            f"{one.gpus_per_actor} | {span(one.gpu_hours)} | {nodes:,}"
        )
    header = f"model | rows | tokens a row | operations | tokens/s of a GPU | GPUs an actor | GPU hours | nodes of {ASSUMED.node_gpus} for {DAYS} days"
    return f"""## GPU hours

Operations are those of the layers' weights and of causal attention (`pipeline/estimates/costs.py`), at {UTILIZATION[0]:.0%} to {UTILIZATION[1]:.0%}
of {gpu.bf16 / 1e12:,.0f} TFLOP/s ({gpu.rate_from}), {gpu.price:.2f} USD an hour
({gpus.PRICE_LIST}, {gpus.PRICED}). Reckoned, not measured. Small models on short rows stay below these shares: measure some minutes on one GPU, and
give `llmemb plan` the tokens/s that you saw
(`--throughput`). Where an actor has several GPUs (the weights of one do not fit), vLLM with `--tensor-parallel` is meant; the transformers backend
lets them work one after the other.

{table(header, rows)}"""


def _storage() -> str:
    rows = []
    for name, config in configs().items():
        for many in ROWS:
            sizes = [case(name, config, many, TOKENS[0], dtype).vector_bytes for dtype in DTYPES]
            priced = " | ".join(f"{text.size(size)} ({money(size / 1e9 * ASSUMED.gb_month)})" for size in sizes)
            rows.append(f"{name} | {config.hidden_size:,} | {_rows(many)} | {priced}")
    seven = case("7B", configs()["7B"], ROWS[1], TOKENS[0], "float32")
    year = seven.vector_bytes / 1e9 * ASSUMED.gb_month
    return f"""## Storage

Vectors alone, and in brackets USD a month at {ASSUMED.gb_month} a GB. Beside a vector a row has its id, source, token count and prompt hash, some
dozens of bytes, which `llmemb plan` takes from a sample. `--dtype` and `--dimensions` decide this bill: in a year 10¹¹ float32 vectors of the 7B
model cost {near(12 * year)} USD, embedding them once cost {span(seven.gpu_hours, seven.gpu_price)} (rows of {TOKENS[0]} tokens).

{table(f"model | dimensions | rows | {' | '.join(DTYPES)}", rows)}"""


def _request_cost(one: Case, unit: dict[str, float], group: dict[str, float]) -> float:
    put = one.units * unit["put"] + one.groups * group["put"]
    get = one.units * unit["get"] + one.groups * group["get"]
    return put / 1000 * ASSUMED.put_1000 + get / 1000 * ASSUMED.get_1000


def _requests(parts: dict[str, Any], cases: list[Case]) -> str:
    unit, group = per_request(parts)
    rows = []
    for one in cases:
        put, get = (one.units * unit[kind] + one.groups * group[kind] for kind in ("put", "get"))
        rows.append(
            f"{one.name} | {_rows(one.rows)} | {one.tokens} | {count(one.rows_per_unit)} | {count(one.units)} | {count(put)} | "
            f"{count(get)} | {money(_request_cost(one, unit, group))}"
        )
    header = "model | rows | tokens a row | rows a unit | units | PUT and LIST | GET and HEAD | USD"
    return f"""## Requests

**Measured** [requests], on a real S3 server, by counting every call of the client: a unit takes {unit["put"]:.1f} PUT or LIST and {unit["get"]:.1f}
GET or HEAD from its beginning to the end of the run
(shard, commit, a look for a commit before, the input looked at, the commit read again and compacted), a piece that is read as one {group["put"]:.1f}
and {group["get"]:.1f} more. A piece larger than 8 MB a column takes a GET for
each 8 MB. Files of {ASSUMED.file_rows:,} rows in row groups of {ASSUMED.group_rows:,} are assumed; PUT and LIST at {ASSUMED.put_1000} and GET and
HEAD at {ASSUMED.get_1000} USD a thousand.

{table(header, rows)}
Units are what `llmemb plan` would cut: a minute of an actor at {GPU_FLOPS / 1e12:,.0f} TFLOP/s a GPU, 128 MiB of {CHOSEN} vectors, or a row group,
whichever is smallest.
"""


def _head(parts: dict[str, Any], cases: list[Case], head: Head) -> str:
    rows = []
    for name in ("driver-1000", "driver-10000", "driver-window-250", "driver-actors-16"):
        if name in parts:
            run = parts[name]
            cpu = run["cpu_ms_per_unit"]
            rows.append(
                f"[{name}] | {run['units']:,} | {run['window_units']:,} | {run['actors']} | {cpu['driver']:.1f} | {cpu['ledger']:.1f} | "
                f"{cpu['gcs'] + cpu['raylet']:.1f} | {run['units_per_second']:.0f} | {run['driver_mb_first']:.0f} / "
                f"{run['peak_mb']['driver']} | {' '.join(f'{value:.1f}' for value in run['driver_kb_per_unit_by_window'][:4])} | {run['peak_mb']['gcs']}"
            )
    header = "part | units | window | actors | driver, ms | ledger, ms | gcs and raylet, ms | units/s | driver, MB | kB a unit, by window | gcs, MB"
    plan, resumed = parts[PLANNING], parts[RESUME]
    new = resumed["of_a_new_run"]
    limit = head.units_per_second()
    gcs = ", ".join(f"{part['peak_mb']['gcs']} [{name}]" for name, part in parts.items() if name in ("driver-1000", DRIVER))
    seconds = {one.name: one.unit_seconds for one in cases if one.rows == ROWS[0] and one.tokens == TOKENS[0]}
    far = ", ".join(f"{count(limit * value)} actors of {name}, whose units take {value:.0f} s" for name, value in seconds.items())
    most = max(cases, key=lambda one: one.units)
    full = [f"{one.name} on {_rows(one.rows)} rows of {one.tokens} tokens" for one in cases if _per_second(one) > limit]
    over = f"It is too slow for {', '.join(full)} in {DAYS} days: there units must be larger" if full else f"That is enough for every case here in {DAYS} days"
    short = [f"{one.name} {one.unit_seconds:.0f} s" for one in cases if one.rows == ROWS[0] and one.tokens == TOKENS[0]]
    return f"""## The head

**Measured** with units of one row whose engine takes no time, so that nothing but their handling is left (milliseconds are of the processor, a unit;
units/s is what two shared cores did with
reading, tokenising and writing beside it):

{table(header, rows)}
Memory (private; the driver's at the first unit and at the most) grows with the window while Ray works on it, and by
{head.kept_kb_per_unit:.1f} kB a unit from one window to the next. **Ray's gcs grew too**: {gcs} MB. That this is its list of past tasks, which Ray
bounds (`RAY_task_events_max_num_task_in_gcs`), is a guess: no part went on until it stopped.

The driver is one Python process and cannot use more than a core: at {head.driver_ms_per_unit:.1f} ms it can hand out **{limit:.0f} units a second**,
and keeps {far} at work (rows of {TOKENS[0]} tokens, the middle of
the GPU's range). Reckoned from [{DRIVER}]; Ray looks at every actor in each round, and more than
{max(part["actors"] for part in parts.values() if "actors" in part)} actors were not tried. {over}. The plan
takes a GPU for {GPU_FLOPS / 1e12:.0f} TFLOP/s, whichever it is, and ends a unit at 128 MiB of vectors, so units last
less than a minute ({", ".join(short)}):
`--rows-per-unit` makes them longer.

Planning [{PLANNING}], {plan["files"]:,} files on local disk: {sum(plan["cpu_seconds"].values()):.0f} s of the processor
({", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in plan["cpu_seconds"].items())}),
{max(plan["mb_more_at_the_peak"].values())} MB more memory at the peak, {plan["plan_bytes"] / 1e6:.1f} MB in storage: {head.plan_ms_per_file:.2f} ms
and {head.plan_kb_per_file:.1f} kB a file.{_planning_s3(parts)} Keep files at a million rows
or so: 10¹¹ rows are then 10⁵ files.

Resuming [{RESUME}], {resumed["commits"]:,} of {resumed["commits"] + resumed["left"]:,} units committed:
{resumed["driver_cpu_seconds_to_the_first_unit"]:.0f} s of the driver's processor time to the first new unit
({new["driver_cpu_seconds_to_the_first_unit"]:.0f} in a new run),
{resumed["driver_mb_to_the_first_unit"]} MB ({new["driver_mb_to_the_first_unit"]} in a new run): {head.resume_ms_per_commit:.2f} ms and
{head.resume_kb_per_commit:.1f} kB a commit. It lists the commits and reads none.

Finishing [{RESUME}] reads every commit, holds all of them, and writes them into one file: {resumed["finish_driver_cpu_seconds"]:.0f} s of the
processor and {resumed["finish_driver_mb"]:,} MB at the peak for {resumed["commits"]:,} commits,
{head.finish_kb_per_commit:.1f} kB each. **This is what grows with the corpus**: the {count(most.units)} units of the largest case above are
{head.memory_gb(most, most.units)[1]:,.0f} GB at that rate (extrapolated). Size the head for it, make
units larger (`--rows-per-unit`, a smaller `--dtype`, larger row groups), or cut the corpus into several runs. While it works the driver takes about
{head.memory_gb(most, 10**6)[0]:.1f} GB for a million units, if it goes on growing from window to window as it did here.
"""


def _planning_s3(parts: dict[str, Any]) -> str:
    if "planning-s3-10000" not in parts:
        return ""
    run = parts["planning-s3-10000"]
    asked = ", ".join(f"{count} {name.split(' ')[0]}" for name, count in run["requests"].items())
    return (
        f" From S3 [planning-s3-10000], {run['files']:,} files: {sum(run['cpu_seconds'].values()):.0f} s of the processor, "
        f"{sum(run['seconds_of_the_clock'].values()):.0f} s of the clock on the shared cores; {asked}."
    )


def _workers(parts: dict[str, Any], cases: list[Case]) -> str:
    runs = sorted((part for name, part in parts.items() if name.startswith("busy-")), key=lambda part: (-part["dimension"], part["actors"]))
    alike = [run for run in runs if run["dimension"] == runs[0]["dimension"]]
    rows = []
    for run in runs:
        cpu = run["cpu_seconds_per_million_tokens"]
        of = run["cpu_seconds_per_million_tokens_of"]
        rows.append(
            f"{run['actors']} | {run['dimension']:,} | {run['busy_share']:.1%} | {run['tokens_per_s']:,} | {cpu['readers']:.2f} | "
            f"{of['read']:.2f} / {of['tokenise']:.2f} | {cpu['actors']:.2f} | "
            f"{of['encode'] + of['write'] + of['check'] + of['commit']:.2f} / {of['engine']:.2f} | "
            f"{cpu['driver'] + cpu['ledger'] + cpu['gcs'] + cpu['raylet']:.2f} | "
            f"{run['cores_of_this_job']:.2f} / {run['cores_of_the_machine_used_by_all']:.2f}"
        )
    header = "GPUs | dimensions | busy | tokens/s | readers | reading / tokenising | actors | writing / stand-in | driver, ledger, Ray | cores: job / all"
    first = parts[BUSY]
    cpu, of = first["cpu_seconds_per_million_tokens"], first["cpu_seconds_per_million_tokens_of"]
    writing = cpu["actors"] - of["engine"]
    gpu = gpus.find(ASSUMED.gpu)
    need = []
    for one in [one for one in cases if one.rows == ROWS[0]]:
        speed = gpu.bf16 * sum(UTILIZATION) / 2 / (one.flops / one.rows / one.tokens) * one.gpus_per_actor
        scale = TOKENS[0] / one.tokens * one.dimension / first["dimension"]
        need.append(
            f"{one.name} | {one.tokens} | {count(speed)} | {cpu['readers'] * speed / 1e6:.2f} | {writing * scale * speed / 1e6:.2f} | "
            f"{speed / one.tokens * one.vector_bytes / one.rows / 1e6:.1f}"
        )
    per_second = {role: slope([(run["actors"], run["cpu_seconds"][role] / run["measured_seconds"]) for run in alike]) for role in ("driver", "ledger")}
    more = ""
    if min(per_second.values()) > 0:
        more = (
            f"From line to line an actor more takes {1000 * per_second['driver']:.1f} ms of the driver and {1000 * per_second['ledger']:.1f} ms of the ledger "
            "a second, each of which is one process.\n\n"
        )
    control = sum(cpu[role] for role in ("driver", "ledger", "gcs", "raylet")) * first["tokens_per_s_of_an_actor"] / 1e6
    cores = control + (cpu["readers"] + writing) * first["tokens_per_s_of_an_actor"] / 1e6
    best = max((run["actors"] for run in runs if run["busy_share"] >= 0.95), default=None)
    kept = f"Up to {best} such GPUs were kept busy for 95 % of the time" if best else "None of these runs kept its GPUs busy for 95 % of the time"
    return f"""## Reading, tokenising, writing

**Measured** [busy-N] with stand-ins of {first["tokens_per_s_of_an_actor"]:,} tokens/s, {first["tokens_per_unit"]:,} tokens a unit (a tenth of a
minute's: what a unit costs weighs ten times as much as it will), texts of about a
hundred tokens, OPT's tokenizer, float32 vectors to a file system in memory; readers, actors, driver and Ray together on two cores that others used
too (the last
column: cores that this job, and all, took).
Seconds of the processor for a million tokens:

{table(header, rows)}
{more}{kept}. The job, stand-ins and all, got {first["cores_of_this_job"]:.1f} of two cores [{BUSY}]; a
GPU of {first["tokens_per_s_of_an_actor"]:,} tokens/s took {cores:.2f} cores in all, of which driver, ledger and Ray {control:.2f}: two cores of
their own would feed {2 / cores:.0f}. Reading and
tokenising limit it, then encoding and writing, not scheduling, and all of that runs on the workers and grows with them. Readers took
{cpu["readers"] / (of["read"] + of["tokenise"]):.1f} times what reading and tokenising itself did: the rest is processes
that start, and Ray (not told apart). What an actor of an {ASSUMED.gpu} needs, reckoned from [{BUSY}] for the middle of its
range (writing in
proportion to bytes, readers by what they took in all):

{table("model | tokens a row | tokens/s of an actor | cores to read and tokenise | cores to encode and write | MB/s of vectors", need)}
"""


def _windows(parts: dict[str, Any], cases: list[Case]) -> str:
    run = parts[DRIVER]
    windows = -(-run["units"] // run["window_units"])
    rows = []
    for actors in (8, 64, 512):
        for one in [one for one in cases if one.rows == ROWS[1] and one.tokens == TOKENS[0]]:
            each = window_units(actors) / actors * one.unit_seconds
            rows.append(f"{actors} | {one.name} | {one.unit_seconds:.0f} | {text.duration((each / 3600, each / 3600))} | {_lost(one, each):.0%}")
    return f"""## Windows

A job hands its units to Ray in windows of {WINDOW_UNITS:,}, or of {UNITS_OF_AN_ACTOR} for each actor if that is more (`--window-units`),
which bounds what the driver holds:
{" ".join(f"{value:.0f}" for value in run["driver_mb_most_by_window"])} MB at the most in the windows of [{DRIVER}].
Between two windows the actors end and the next ones load the model again: {run["models_loaded"]} models were loaded by {run["actors"]} actors in
{windows} windows (measured). What is
lost, if loading takes {ASSUMED.load_seconds:.0f} s (assumed) and half a unit is waited for at the end of each:

{table("actors | model | seconds a unit | a window takes | of it lost", rows)}
A larger window loses less: a unit costs the driver no more than {max(0.0, *run["driver_kb_per_unit_by_window"]):.0f} kB.
"""


def _lost(one: Case, window: float) -> float:
    lost = ASSUMED.load_seconds + one.unit_seconds / 2
    return lost / (window + lost)
