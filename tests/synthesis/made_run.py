"""A small synthesis on disk, written by the package's own writers from answers that are made here: no generator is asked.

Of each 10 rows the fourth is no JSON, the sixth was refused; rows 7, 27, 47, … have the same texts in all families that have a negative, and the
same in all that have none. Every other row has texts of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llmemb_ray.generation.generator import Answer
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import brainstorming, duplicates
from llmemb_ray.synthesis.brainstorming import Brainstorming
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.drawing import Draw, Request
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES, WEIGHTS
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.receipt import Receipt, sums
from llmemb_ray.synthesis.record import Record, Synthesis
from llmemb_ray.synthesis.tasks import Pool, Task
from llmemb_ray.synthesis.units import Work, write

COUNT, UNIT_ROWS = 230, 50

LANGUAGES = {"en": 3.0, "de": 1.0}

GENERATOR = "a generator made up"

PROMPT_TOKENS, COMPLETION_TOKENS, TASK_TOKENS = 100, 40, (70, 30)
"""Of each answer; of the brainstorming."""

BEGAN = 1_700_000_000.0


def pool() -> Pool:
    source = f"{GENERATOR}, call 0"
    made = [Task(family=family, task=f"{family} task {number}", source=source) for family in ASYMMETRIC for number in range(3)]
    return Pool([*made, Task(family="short-long", task="A task of one's own", source="mine.jsonl")])


def texts(request: Request, number: int | str) -> dict[str, str]:
    family = FAMILIES[request.family]
    labels = {"label": "alpha", "misleading_label": "beta"}
    return {key: f"{labels.get(key, key)} {number}" for key in family.keys}


def answer(request: Request) -> Answer:
    tokens: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
    if request.row % 10 == 3:
        return Answer(text=f"<b>no JSON</b> {request.row} " + "long " * 100, **tokens)
    if request.row % 10 == 5:
        return Answer(problem="the content filter <i>said no</i>", **tokens)
    if request.row % 20 == 7:
        # Query, positive and negative of one wording whatever the keys.
        names = ("same query", "same positive", "same negative")
        return Answer(text=json.dumps(dict(zip(FAMILIES[request.family].keys, names, strict=False))), **tokens)
    return Answer(text=json.dumps(texts(request, request.row)), **tokens)


def drawn(weights: Mapping[str, float] = WEIGHTS, languages: Mapping[str, float] = LANGUAGES) -> Draw:
    return Draw(seed=7, families=weights, languages=languages, pool=pool(), prompts=Prompts.load(), generator_name=GENERATOR)


@cache
def request(row: int) -> Request:
    """Of a run as ``make`` makes it, if it is not told otherwise."""
    return drawn().request(row)


def has_negative(row: int) -> bool:
    return request(row).family not in ("long-long", "short-short")


def make(
    out: Path,
    *,
    segments: Sequence[int] = (COUNT,),
    weights: Mapping[str, float] = WEIGHTS,
    languages: Mapping[str, float] = LANGUAGES,
    finished: bool = True,
    remove: bool = True,
    keep_raw: bool = False,
    answer: Callable[[Request], Answer] = answer,
) -> Synthesis:
    """finished: with duplicates removed (unless not to ``remove``), commits compacted and a receipt; else the last unit is missing."""
    output = Storage(str(out))
    draw = drawn(weights, languages)
    identity = draw.identity | {"checks": {"keep_raw": keep_raw, "near_duplicates": None}}
    record = Record(identity=identity, segments=list(segments), unit_rows=UNIT_ROWS, settings={"price_in": 1.0, "price_out": 2.0}, versions={}, created=BEGAN)
    record.save(output)
    output.put(brainstorming.PATH, pool().to_lines())
    tasks = {family: len(pool().of(family)) for family in ASYMMETRIC}
    made_of = {"generator": GENERATOR}
    told = {"made_of": made_of, "digest": pool().digest, "calls": 5, "answers": {"ok": 4, "not_json": 1}, "tasks": tasks}
    accounts = Brainstorming(**told, prompt_tokens=TASK_TOKENS[0], completion_tokens=TASK_TOKENS[1])
    output.put(brainstorming.ACCOUNTS, json.dumps(accounts.to_dict()).encode())
    work = Work(draw=draw, output=output, run_key=record.run_key, generator=GENERATOR, max_characters=4000, check_language=False, keep_raw=keep_raw)
    units = list(record.units())
    for unit in units if finished else units[:-1]:
        requests = work.requests(unit)
        write(work, unit, requests, [answer(request) for request in requests], began=BEGAN)
    if finished:
        finish(output, record, remove=remove)
    return opened(out)


def opened(out: Path) -> Synthesis:
    found = Synthesis.open(Storage(str(out)))
    assert found is not None
    return found


def finish(output: Storage, record: Record, *, remove: bool = True) -> None:
    commits = RECORDS.read_all(output)
    if remove:
        commits = duplicates.remove(output, record.run_key, commits, duplicates.find(output, commits, near=None))
        named = {path for commit in commits for path in (commit.shard, commit.rejects)}
        output.delete([entry.path for directory in ("data", "rejects") for entry in output.list(directory) if entry.path not in named])
    RECORDS.compact(output, commits)
    receipt_of(record, commits).save(output)


def receipt_of(record: Record, commits: list[Made]) -> Receipt:
    names = ("accepted", "rejected", "duplicates", "prompt_tokens", "completion_tokens", "retries", "shard_bytes")
    totals = {name: sum(getattr(commit, name) for commit in commits) for name in names}
    counts = {name: sums(commits, name) for name in ("reasons", "notes", "families", "languages")}
    asked = sum(commit.rows for commit in commits)
    return Receipt(
        run_key=record.run_key,
        units=len(commits),
        asked=asked,
        **totals,
        **counts,
        generator=GENERATOR,
        task_prompt_tokens=TASK_TOKENS[0],
        task_completion_tokens=TASK_TOKENS[1],
        cost=0.5,
        seconds_wall=9.0,
        finished=BEGAN + 9,
    )
