"""Everything that the page says of a synthesis, as plain data: collected here, drawn elsewhere.

Invariant: counts are of all rows. Memory holds counts, commits, the task pool and a few examples of each kind, never the run.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmemb_ray.reporting.accounts import Throughput, Worked, rates
from llmemb_ray.reporting.synthesis.reading import Lengths, Reading, Reason, Sample, Tally, ordered
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import brainstorming, tasks
from llmemb_ray.synthesis.receipt import Receipt
from llmemb_ray.synthesis.record import Synthesis
from llmemb_ray.synthesis.spending import Spending

SAMPLES = 3
"""Examples of each family, unless more are asked for."""

TASKS_SHOWN = 10
"""Of each family, those used most."""

BATCH = 1000
"""Rows of a shard that stand in memory as Python objects."""


@dataclass(frozen=True, kw_only=True)
class TaskUse:
    """The pool of one family. own: tasks of the user's; most: those asked for most often, (task, requests, accepted)."""

    family: str
    pool: int
    own: int
    used: int
    requests: int
    most: list[tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class Facts:
    run: str
    state: str
    """finished, running or stopped, as ``status`` says."""
    units: int
    units_committed: int
    rows: int
    """Requests that the run is to make."""
    generator: str
    run_key: str
    created: float
    finished: float
    accounts: dict[str, Any]
    """asked, accepted, rejected, duplicates, reasons, notes and tokens: the receipt's, or the sums so far; cost is None without prices."""
    weights: dict[str, float]
    """By family its share of the requests, as the run draws them."""
    families: dict[str, Tally]
    languages: dict[str, Tally]
    """By English name, the most frequent first; of bitext the query's."""
    lengths: list[Lengths]
    reasons: list[Reason]
    """Of rejects and duplicates, the most frequent first."""
    notes: dict[str, dict[str, int]]
    """Rule -> family -> accepted examples that break it."""
    tasks: list[TaskUse]
    brainstorming: dict[str, Any] | None
    throughput: Throughput | None
    samples: dict[str, list[Sample]]
    with_text: bool
    settings: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect(synthesis: Synthesis, *, samples: int = SAMPLES, with_text: bool = True) -> Facts:
    """samples: examples of each family. Raises OutputError where a file of the run is gone or cannot be read, InputError where its tasks cannot."""
    record, receipt, status, commits = synthesis.record, synthesis.receipt, synthesis.status(), synthesis.commits
    read = Reading(record.run_key, samples)
    for kind in ("shard", "rejects"):
        for _, table in synthesis.tables(kind):
            for batch in table.to_batches(max_chunksize=BATCH):
                for row in batch.to_pylist():
                    read.example(row) if kind == "shard" else read.reject(row)
    total = sum(record.identity["families"].values())
    return Facts(
        run=synthesis.storage.url,
        state=status["state"],
        units=status["units"],
        units_committed=len(commits),
        rows=record.count,
        generator=record.generator,
        run_key=record.run_key,
        created=record.created,
        finished=receipt.finished if receipt else 0.0,
        accounts=_accounts(synthesis),
        weights={name: weight / total for name, weight in record.identity["families"].items()},
        families={name: read.families[name] for name in ordered(read.families)},
        languages=dict(sorted(read.languages.items(), key=lambda item: (-item[1].asked, item[0]))),
        lengths=list(read.all_lengths()),
        reasons=list(read.reasons(with_text)),
        notes={rule: {name: counts[name] for name in ordered(counts)} for rule, counts in sorted(read.notes.items())},
        tasks=_tasks(synthesis.storage, read, with_text),
        brainstorming=made.to_dict() if (made := brainstorming.accounts(synthesis.storage)) else None,
        throughput=rates([Worked(host=c.host, finished=c.finished, seconds=c.seconds, tokens=c.completion_tokens, rows=c.rows) for c in commits]),
        samples={name: read.samples[name].items() for name in ordered(read.samples)} if with_text else {},
        with_text=with_text,
        settings=record.settings,
        versions=receipt.versions if receipt else record.versions,
    )


def _accounts(synthesis: Synthesis) -> dict[str, Any]:
    """The receipt's fields; of an unfinished run as they follow from the commits it has."""
    receipt, commits, settings = synthesis.receipt, synthesis.commits, synthesis.record.settings
    if receipt is not None:
        return receipt.to_dict()
    made = brainstorming.accounts(synthesis.storage)
    so_far = Receipt.of(
        commits,
        run_key=synthesis.record.run_key,
        generator=synthesis.record.generator,
        of_tasks=(made.prompt_tokens, made.completion_tokens) if made else (0, 0),
        spending=Spending(price_in=settings.get("price_in"), price_out=settings.get("price_out"), budget=None, longest_answer=0),
        seconds_wall=0.0,
        versions=synthesis.record.versions,
    )
    return so_far.to_dict() | {"seconds_wall": None}


def _tasks(storage: Storage, read: Reading, with_text: bool) -> list[TaskUse]:
    """By family; one that only the pool or only the examples have among them."""
    pool: Counter[str] = Counter()
    own: Counter[str] = Counter()
    made = brainstorming.accounts(storage)
    by_generator = f"{made.made_of['generator']}, call " if made and "generator" in made.made_of else None
    if storage.exists(brainstorming.PATH):
        for task in tasks.read_file(storage.display(brainstorming.PATH), storage.access):
            pool[task.family] += 1
            own[task.family] += by_generator is None or not task.source.startswith(by_generator)
    uses: dict[str, dict[str, Tally]] = defaultdict(dict)
    for (family, text), tally in read.tasks.items():
        uses[family][text] = tally
    return [
        TaskUse(
            family=family,
            pool=pool[family],
            own=own[family],
            used=len(uses[family]),
            requests=sum(tally.asked for tally in uses[family].values()),
            most=[(text, tally.asked, tally.accepted) for text, tally in _most(uses[family])] if with_text else [],
        )
        for family in ordered(pool | Counter(dict.fromkeys(uses, 1)))
    ]


def _most(uses: Mapping[str, Tally]) -> list[tuple[str, Tally]]:
    return heapq.nsmallest(TASKS_SHOWN, uses.items(), key=lambda item: (-item[1].asked, item[0]))
