"""The receipt of a synthesis: the accounts of a finished run.

Invariant: asked = accepted + rejected + duplicates, for each unit and in total, or there is no receipt.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmemb_ray.errors import NotFound, OutputError, RunFailed
from llmemb_ray.shards.receipt import PATH
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.commits import Made
from llmemb_ray.synthesis.spending import Spending
from llmemb_ray.synthesis.units import REJECTS, Unit


@dataclass(frozen=True, kw_only=True)
class Receipt:
    run_key: str
    units: int
    asked: int
    accepted: int
    rejected: int
    duplicates: int
    reasons: dict[str, int]
    """Rejects and duplicates by reason."""
    notes: dict[str, int]
    """Accepted examples by the length rule they break."""
    families: dict[str, int]
    """Accepted examples."""
    languages: dict[str, int]
    """Accepted examples."""
    generator: str
    prompt_tokens: int
    completion_tokens: int
    task_prompt_tokens: int
    """Of the brainstorming."""
    task_completion_tokens: int
    cost: float | None
    """Of all tokens at the prices of the command that finished; None without prices, or where no tokens were told."""
    retries: int
    shard_bytes: int
    seconds_wall: float
    """Of the command that finished the run, this time."""
    versions: dict[str, str] = field(default_factory=dict)
    finished: float = 0.0

    @classmethod
    def of(
        cls,
        commits: Sequence[Made],
        *,
        run_key: str,
        generator: str,
        of_tasks: tuple[int, int],
        spending: Spending,
        seconds_wall: float,
        versions: dict[str, str],
    ) -> Receipt:
        """of_tasks: (prompt tokens, tokens of answers) of the brainstorming."""

        def total(name: str) -> int:
            return sum(getattr(commit, name) for commit in commits)

        prompt_tokens, completion_tokens = total("prompt_tokens"), total("completion_tokens")
        tokens = prompt_tokens + of_tasks[0], completion_tokens + of_tasks[1]
        return cls(
            run_key=run_key,
            units=len(commits),
            asked=total("rows"),
            accepted=total("accepted"),
            rejected=total("rejected"),
            duplicates=total("duplicates"),
            **{name: sums(commits, name) for name in ("reasons", "notes", "families", "languages")},
            generator=generator,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            task_prompt_tokens=of_tasks[0],
            task_completion_tokens=of_tasks[1],
            cost=spending.of(*tokens) if spending.priced and any(tokens) else None,
            retries=total("retries"),
            shard_bytes=total("shard_bytes"),
            seconds_wall=seconds_wall,
            versions=versions,
            finished=time.time(),
        )

    def require_examples(self, output: Storage) -> None:
        """Raises RunFailed where no answer became an example."""
        if not self.accepted:
            raise RunFailed(no_examples(self.asked, self.reasons, output))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, storage: Storage) -> None:
        storage.put(PATH, json.dumps(self.to_dict(), indent=1, sort_keys=True).encode())

    @classmethod
    def load(cls, storage: Storage) -> Receipt | None:
        """None where the run is not finished. Raises OutputError."""
        try:
            return cls(**json.loads(storage.read(PATH)))
        except NotFound:
            return None
        except (ValueError, TypeError) as error:
            raise OutputError(f"{storage.display(PATH)} is no receipt of a synthesis of this version: {error}") from error

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        told = f" ({', '.join(f'{count:,} {reason}' for reason, count in sorted(self.reasons.items(), key=lambda item: -item[1]))})" if self.reasons else ""
        yield f"{self.asked:,} asked = {self.accepted:,} accepted + {self.rejected:,} rejected + {self.duplicates:,} duplicates{told}"
        if self.families:
            shown = ", ".join(f"{name} {count:,}" for name, count in sorted(self.families.items(), key=lambda item: -item[1]))
            yield f"{shown}; {len(self.languages):,} languages"
        if self.notes:
            yield f"kept though they break a length rule: {', '.join(f'{count:,} {rule}' for rule, count in self.notes.items())} (strict rejects them)"
        tokens = f"{self.prompt_tokens + self.task_prompt_tokens:,} prompt tokens, {self.completion_tokens + self.task_completion_tokens:,} of answers"
        yield f"{tokens}{'' if self.cost is None else f', cost {self.cost:,.2f}'}; {self.retries:,} requests tried again"


def no_examples(answers: int, reasons: Mapping[str, int], output: Storage) -> str:
    """That all of so many answers were rejected, and the way out."""
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    return (
        f"none of {answers:,} answers became an example ({told}): look at {output.display(REJECTS)}, then begin anew with --overwrite and another generator, "
        "--structured, --prompts or --max-new-tokens"
    )


def sums(commits: Iterable[Made], name: str) -> dict[str, int]:
    """A dictionary of counts, over all units."""
    total: Counter[str] = Counter()
    for commit in commits:
        total.update(getattr(commit, name))
    return dict(sorted(total.items()))


def reconcile(planned: Iterable[Unit], commits: Sequence[Made]) -> None:
    """Raises RunFailed unless the commits account for every request of every unit, once."""
    wanted = {unit.name: unit for unit in planned}
    problems = [f"unit {name} has no commit" for name in sorted(wanted.keys() - {commit.unit for commit in commits})]
    for commit in commits:
        unit = wanted.get(commit.unit)
        if unit is None:
            problems.append(f"commit {commit.unit} belongs to no unit of the run")
        elif commit.rows != unit.rows or commit.accepted + commit.rejected + commit.duplicates != unit.rows:
            problems.append(f"unit {commit.unit} has {unit.rows} requests, its commit accounts for {commit.accepted} + {commit.rejected} + {commit.duplicates}")
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise RunFailed(f"the accounts do not balance: {'; '.join(problems[:10])}{more}. Run the same command again, it does the units without a commit")
