"""An estimate of a synthesis in words. Knows only what an ``Estimate`` holds."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from textwrap import wrap

from llmemb_ray.pipeline.estimates import gpus
from llmemb_ray.pipeline.estimates.text import WIDTH, between, duration, quantity
from llmemb_ray.synthesis.lengths import Span

if typing.TYPE_CHECKING:
    from llmemb_ray.synthesis.estimate import Estimate, Part


def lines(made: Estimate) -> list[str]:
    """All of it, for a terminal."""
    if not made.left.requests:
        return [*_head(made), *_totals(made), "nothing is left to ask"]
    parts = [list(part) for part in (_head(made), _table(made), _totals(made), _gpus(made), _list("notes", made.notes), _list("assumptions", made.assumptions))]
    return [line for part in parts if part for line in ("", *part)][1:]


def _head(made: Estimate) -> Iterator[str]:
    left = made.examples - made.done
    yield f"{made.examples:,} examples of {made.generator} in {made.out}" + (f": {made.done:,} answered, {left:,} left" if made.done else "")


def _table(made: Estimate) -> Iterator[str]:
    yield f"{'left to ask':<22}{'requests':>10}{'prompt tokens':>16}{'answer tokens':>16}   least - most"
    for family, part in made.tasks.items():
        yield _row(f"tasks {family}", part)
    for family, part in made.families.items():
        yield _row(family, part)
    yield _row("all", made.left)


def _row(name: str, part: Part) -> str:
    answers = part.answer_tokens
    return f"{name:<22}{part.requests:>10,}{part.prompt_tokens:>16,.0f}{answers.expected:>16,.0f}   {answers.least:,.0f} - {answers.most:,.0f}"


def _totals(made: Estimate) -> Iterator[str]:
    if any(made.spent_tokens):
        prompts, answers = made.spent_tokens
        yield f"{'so far':<10}{prompts:,} prompt tokens, {answers:,} of answers" + (f": {_price(made.spent)}" if made.spent is not None else "")
    if made.cost is not None and made.left.requests:
        yield f"{'cost':<10}{_price(made.cost.expected)} of what is left ({_price(made.cost.least)} - {_price(made.cost.most)})"
    if made.budget is not None and made.affordable is not None and made.left.requests:
        left = made.examples - made.done
        verdict = "is expected to do" if made.enough else f"pays {_count(made.affordable)} of the {left:,} examples left"
        at_worst = f", or for {made.affordable.least:,.0f} of {left:,} examples at worst" if made.enough and made.affordable.least < left else ""
        yield f"{'budget':<10}{made.budget:g} {verdict}{at_worst}"
    if made.time is not None:
        fast, slow = made.time.binds
        why = f"bound by {fast}" if fast == slow else f"bound by {fast} at best, {slow} at worst"
        yield f"{'time':<10}{duration((made.time.seconds[0] / 3600, made.time.seconds[1] / 3600))}, {why}"


def _gpus(made: Estimate) -> Iterator[str]:
    if made.gpus:
        yield f"{'GPU':<8}{'GPUs/actor':>10}{'at once':>9}{'tokens/s of an actor':>22}{'GPU hours':>16}{'price/h':>9}{f'cost in {gpus.CURRENCY}':>16}"
        for line in made.gpus:
            low, high = map(quantity, line.tokens_per_s)
            yield (
                f"{line.gpu:<8}{line.gpus_per_actor:>10,}{line.batch:>9,}{f'{low} - {high}':>22}{between(line.gpu_hours):>16}{line.price:>9,.2f}"
                f"{between(line.cost):>16}"
            )


def _price(value: float | None) -> str:
    return "?" if value is None else f"{value:,.2f}" if value >= 1 or not value else f"{value:.2g}"


def _count(span: Span) -> str:
    return f"{span.expected:,.0f} ({span.least:,.0f} - {span.most:,.0f})"


def _list(title: str, items: list[str]) -> Iterator[str]:
    if items:
        yield title
    for item in items:
        yield from wrap(f"- {item}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
