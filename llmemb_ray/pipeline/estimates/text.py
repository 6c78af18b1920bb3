"""An estimate in words, for a person who must decide what to rent. Knows only what an ``Estimate`` holds."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap

from llmemb_ray.pipeline.estimates.costs import Hours, Range
from llmemb_ray.pipeline.estimates.estimate import Estimate

WIDTH = 110
"""Characters of a line."""


def text(estimate: Estimate) -> str:
    """The whole estimate in sections: corpus, tokens, work, hours and cost, notes, assumptions."""
    parts = [
        _section("corpus", _corpus(estimate)),
        "tokens\n" + "\n".join(_tokens(estimate)),
        _section("work", _work(estimate)),
        "\n".join(_hours(estimate)),
        _list("notes", estimate.notes),
        _list("assumptions", estimate.assumptions),
    ]
    return "\n\n".join(part for part in parts if part)


def _section(title: str, lines: dict[str, str]) -> str:
    width = max(len(name) for name in lines)
    return "\n".join([title, *(f"{name:<{width}}  {value}" for name, value in lines.items())])


def _list(title: str, items: list[str]) -> str:
    return "\n".join([title, *(line for item in items for line in wrap(f"- {item}", WIDTH, subsequent_indent="  ", break_on_hyphens=False))]) if items else ""


def _corpus(made: Estimate) -> dict[str, str]:
    left_out = f", {made.bad_files:,} of them left out" if made.bad_files else ""
    lines = {"files": f"{made.files:,}{left_out}, {size(made.bytes)}", "rows": f"{made.rows:,}", "columns": f"text {made.text_column!r}, id {made.id_column!r}"}
    if made.sample_rows >= made.rows:
        lines["sample"] = "all rows: the counts are exact"
    else:
        lines["sample"] = f"{made.sample_rows:,} rows from {made.sample_places:,} places"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(made.sample_rejects.items()))
    if reasons:
        lines["rejects"] = f"{made.rows_rejected:,} ({reasons} in the sample)"
    if made.rows_filtered:
        lines["filtered out"] = f"{made.rows_filtered:,}"
    return lines


def _tokens(made: Estimate) -> Iterator[str]:
    yield f"{'':<22}{'mean':>10}{'p50':>9}{'p99':>9}{'maximum':>10}"
    for name, spread in (("text alone", made.text_tokens), ("prompt", made.uncut_tokens), ("prompt as embedded", made.prompt_tokens)):
        yield f"{name:<22}{spread.mean:>10,.1f}{spread.p50:>9,}{spread.p99:>9,}{spread.maximum:>10,}"
    exact = made.sample_rows >= made.rows
    margin = "" if exact else f" ± {made.tokens_margin:,}"
    yield f"{'all prompts':<22}{made.tokens:,}{margin} tokens in {made.prompts:,} prompts"
    share = made.sample_truncated / max(1, made.sample_prompts)
    bound = f" (fewer than {3 / made.sample_prompts:.2%} of all)" if not made.sample_truncated and not exact and made.sample_prompts else ""
    yield f"{'cut':<22}{share:.2%} at {made.max_tokens:,} tokens: {made.sample_truncated:,} of {made.sample_prompts:,} sampled prompts{bound}"
    yield f"{'template':<22}{made.template_tokens:,} tokens: {_shortened(made.template)}"
    if made.shared_prefix_tokens:
        saved = ", ".join(f"{name} {count:,} ({count / max(1, made.tokens):.1%})" for name, count in made.tokens_shared_by.items())
        yield f"{'shared prefix':<22}{made.shared_prefix_tokens:,} tokens; saves, of all tokens: {saved}"
    else:
        yield f"{'shared prefix':<22}none worth sharing"


def _work(made: Estimate) -> dict[str, str]:
    others = ", ".join(f"{dtype} {size(count)}" for dtype, count in made.shard_bytes_by.items() if dtype != made.dtype)
    attention = made.flops_attention / max(1.0, made.flops)
    share = f"{attention:.0%}" if attention >= 0.005 else "less than 1%"
    return {
        "model": f"{made.model}: about {quantity(made.parameters)} parameters, {size(made.weight_bytes)} as a GPU holds them",
        "backend": f"{made.backend}: {made.backend_why}",
        "units": f"{made.units:,}",
        "vectors": f"{made.vectors:,} of {made.dimension:,} dimensions",
        "output": f"{size(made.shard_bytes)} as {made.dtype}; {others}",
        "operations": f"{made.flops:.3g} for {made.tokens_computed:,} tokens computed, {share} of them attention",
        "space": made.space,
    }


def _hours(made: Estimate) -> Iterator[str]:
    if not made.hours:
        return
    several = made.actors is not None and made.actors > 1
    currency = next((f" in {line.currency}" for line in made.hours if line.currency), "")
    yield f"hours and cost{currency}"
    actors = f"{f'with {made.actors:,} actors':>20}" if several else ""
    yield f"{'GPU':<10}{'GPUs/actor':>10}{'tokens/s of a GPU':>20}{'GPU hours':>18}{actors}{'price/h':>10}{'cost':>18}"
    for line in made.hours:
        elapsed = ""
        if several and made.actors:
            busy = min(made.actors, made.units) * line.gpus_per_actor
            elapsed = f"{duration((line.gpu_hours[0] / busy, line.gpu_hours[1] / busy)):>20}"
        price = f"{line.price:,.2f}" if line.price is not None else "?"
        cost = between(line.cost) if line.cost else "?"
        yield f"{line.gpu or 'as given':<10}{line.gpus_per_actor:>10,}{_rates(line):>20}{between(line.gpu_hours):>18}{elapsed}{price:>10}{cost:>18}"


def _rates(line: Hours) -> str:
    low, high = (quantity(rate) for rate in line.tokens_per_s)
    return low if low == high else f"{low} - {high}"


def between(values: Range) -> str:
    """``0.52 - 1.1``: as many digits as say something."""
    low, high = (_number(value) for value in values)
    return low if low == high else f"{low} - {high}"


def duration(hours: Range) -> str:
    """Elapsed time in the unit that fits the longer end."""
    factor, unit = next(((factor, unit) for factor, unit, least in ((1 / 24, "d", 48), (1, "h", 1), (60, "min", 1 / 60)) if hours[1] >= least), (3600, "s"))
    return f"{between((hours[0] * factor, hours[1] * factor))} {unit}"


def _number(value: float) -> str:
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    if value < 0.01:
        return "<0.01"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def quantity(value: float) -> str:
    """``6.7 B``, ``125 M``, ``9,000``."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value / 1e3:.3g} k" if value >= 1e4 else f"{value:,.0f}"


def size(bytes_: float) -> str:
    """Bytes in powers of ten, as object stores bill them."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if bytes_ >= unit:
            return f"{bytes_ / unit:,.1f} {name}"
    return f"{bytes_:,.0f} B"


def _shortened(template: str) -> str:
    shown = repr(template)
    return shown if len(shown) <= 70 else f"{shown[:45]} … {shown[-22:]}"
