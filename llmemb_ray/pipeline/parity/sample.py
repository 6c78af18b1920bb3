"""The rows that are compared: prompts of the built-in texts, or of a sample of a corpus, made as a job makes them.

Invariant: which rows they are follows from the files, the settings and the number asked for. A row that makes no prompt is named, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmemb_ray.corpus import lookup, sample
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import InputError
from llmemb_ray.pipeline.parity.texts import texts
from llmemb_ray.pipeline.prepare import FILTERED_TIMES, Job, make_prompts
from llmemb_ray.representation import Role, TokenRows
from llmemb_ray.shards.plan import Plan
from llmemb_ray.storage import redact

BEGINNING = 60
"""Characters of a text that name it in messages and records."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """N prompts, and the texts that made none.

    names:   [N]  what each prompt is called: the beginning of a built-in text; of a corpus file and row, never its text
    rejects: (name, reason, detail)
    source:  what the texts are, in words
    """

    prompts: TokenRows
    names: list[str]
    rejects: list[tuple[str, str, str]]
    source: str


def built_in(spec: EmbedderSpec, role: Role, rows: int) -> Sample:
    """At most ``rows`` of the built-in texts."""
    assert spec.representation.max_tokens is not None
    chosen = texts(spec.representation.max_tokens)[:rows]
    prompts, unfit = spec.prompter(role).tokenize(chosen)
    fit = [row for row, problem in enumerate(unfit) if problem is None]
    rejects = [(_name(chosen[row]), problem.reason, problem.detail) for row, problem in enumerate(unfit) if problem is not None]
    return Sample(prompts=prompts.take(fit), names=[_name(chosen[row]) for row in fit], rejects=rejects, source=f"{len(chosen)} built-in texts")


def of_corpus(job: Job, plan: Plan, rows: int) -> Sample:
    """About ``rows`` prompts from places spread evenly over the corpus. Raises InputError where it cannot be read or none of its rows makes a prompt."""
    chosen = sample.places(plan.files, rows * (FILTERED_TIMES if job.selection.filter else 1))
    table = sample.read(chosen, job.selection, job.access)
    found, problems = job.selection.texts(table)
    made = make_prompts(job, found)
    problems |= made.problems
    if not len(made.rows):
        raise InputError(f"none of {table.num_rows} rows sampled makes a prompt; look at the text column and the filter, or compare more rows")
    files = {file.index: redact(file.url).rsplit("/", 1)[-1] for file in plan.files}
    places = zip(table[sample.SOURCE_FILE].to_pylist(), table[sample.SOURCE_ROW].to_pylist(), strict=True)
    named = [f"row {row} of {files[file]}" for file, row in places]
    taken = np.unique(np.linspace(0, len(made.rows) - 1, min(rows, len(made.rows))).round().astype(np.int64)).tolist()
    return Sample(
        prompts=made.rows.take(taken),
        names=[named[int(made.owner[prompt])] for prompt in taken],
        rejects=[(named[row], *problems[row]) for row in sorted(problems)],
        source=f"{len(taken):,} prompts of the corpus",
    )


def _name(text: str) -> str:
    return lookup.beginning(text, BEGINNING)
