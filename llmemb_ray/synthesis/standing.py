"""What OUT already holds of the synthesis that settings ask for: tasks, answers, tokens, time, and the rows that are left.

Invariant: reads alone, also while a job is at work there. What would stop ``synthesize`` because OUT holds something else is raised here too.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.generation import answers
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import brainstorming, execution
from llmemb_ray.synthesis.commits import RECORDS
from llmemb_ray.synthesis.job import Asked
from llmemb_ray.synthesis.record import Record
from llmemb_ray.synthesis.tasks import Pool
from llmemb_ray.synthesis.times import measured_rate


@dataclass(frozen=True, kw_only=True)
class Standing:
    pool: Pool
    """As it stands; the user's own tasks where it is still to be made."""
    brainstorms: bool
    """Whether it is still to be made."""
    calls: dict[str, int] = field(default_factory=dict)
    """Brainstorming calls by family whose answers are kept for a pool that is still to be made."""
    examples: int
    """Asked for in all."""
    open_rows: Sequence[range]
    """Rows of the units without a commit."""
    kept: frozenset[int] = frozenset()
    """Rows of these whose answers are kept."""
    answered: int = 0
    committed: int = 0
    """Of the answered ones, those of units with a commit."""
    accepted: int = 0
    """Of the committed ones, those that no check rejected."""
    tokens: tuple[float, float] | None = None
    """Mean (prompt tokens, tokens of the answer) of the answered ones; None where there are none, or tell none."""
    spent: tuple[int, int] = (0, 0)
    """(prompt tokens, tokens of answers) of all commands, brainstorming included."""
    rate: float | None = None
    """Requests a second of the units that are committed."""

    @classmethod
    def of(cls, settings: SynthesizeSettings, asked: Asked, output: Storage, *, known: bool = True) -> Standing:
        """known: whether ``asked`` has the generator's name; else that of OUT is taken for it.

        Raises RunMismatch for a synthesis with other settings, ConfigError or OutputError for what cannot be continued.
        """
        record = None if settings.overwrite else Record.load(output)
        made = None if settings.overwrite else brainstorming.accounts(output)
        if not known and (record or made):
            asked = replace(asked, names=(record.generator if record else str(made and made.made_of.get("generator")),))
        pool = None if settings.overwrite else brainstorming.standing(output, [asked.brief.identity(name) for name in asked.names])
        if record is None:
            thought = {} if settings.overwrite else answers.read(output, brainstorming.ANSWERS)
            return cls(
                pool=Pool(asked.brief.given) if pool is None else pool,
                brainstorms=pool is None,
                calls=dict(Counter(key.split(" ")[0] for name, key in thought if name in asked.names)) if pool is None else {},
                examples=settings.count,
                open_rows=[range(settings.count)],
                spent=answers.tokens(thought.values()),
            )
        name = record.generator if record.generator in asked.names else asked.names[0]
        if pool is None:
            record.require(record.identity | {"brainstorming": asked.brief.identity(name)}, output.url)
            pool = Pool()  # Its accounts are gone: the drawing says what is missing.
        record.require(asked.identity(pool, name), output.url)
        return cls._of_record(record.up_to(settings.count), pool, output)

    @classmethod
    def _of_record(cls, record: Record, pool: Pool, output: Storage) -> Standing:
        commits = RECORDS.read_all(output)
        done = {commit.unit for commit in commits}
        waiting = [unit for unit in record.units() if unit.name not in done]
        under_way = {entry.path.rpartition("/")[2].removesuffix(".jsonl"): answers.read(output, entry.path) for entry in output.list(execution.ANSWERS)}
        kept = {int(key): answer for unit in waiting for (name, key), answer in under_way.get(unit.name, {}).items() if name == record.generator}
        rows = sum(commit.rows for commit in commits) + len(kept)
        of_kept = answers.tokens(kept.values())
        prompts, completions = (sum(getattr(commit, name) for commit in commits) for name in ("prompt_tokens", "completion_tokens"))
        of_others = answers.tokens(answer for entries in [*under_way.values(), answers.read(output, brainstorming.ANSWERS)] for answer in entries.values())
        told = rows > 0 and prompts + of_kept[0] > 0 and completions + of_kept[1] > 0
        return cls(
            pool=pool,
            brainstorms=False,
            examples=record.count,
            open_rows=[range(unit.start, unit.start + unit.rows) for unit in waiting],
            kept=frozenset(kept),
            answered=rows,
            committed=rows - len(kept),
            accepted=sum(commit.accepted for commit in commits),
            tokens=((prompts + of_kept[0]) / rows, (completions + of_kept[1]) / rows) if told else None,
            spent=(prompts + of_others[0], completions + of_others[1]),
            rate=measured_rate(commits),
        )

    @property
    def left(self) -> int:
        """Rows that nobody answered yet."""
        return sum(map(len, self.open_rows)) - len(self.kept)

    def sample(self, seed: int, most: int) -> list[int]:
        """Rows that are left: all, or about ``most`` of them, the same for the same seed."""
        ends = list(accumulate(map(len, self.open_rows)))
        total = ends[-1] if ends else 0
        places = range(total) if total <= most else sorted(random.Random(seed).sample(range(total), most))
        rows = (self.open_rows[found][place - ends[found]] for place in places for found in [bisect_right(ends, place)])
        return [row for row in rows if row not in self.kept]
