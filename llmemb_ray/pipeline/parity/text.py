"""A comparison in words, for a person who must decide whether to start a job. Knows only what a ``Parity`` holds."""

from __future__ import annotations

from collections.abc import Iterator

from llmemb_ray.pipeline.parity.comparison import NEIGHBOURS, Comparison
from llmemb_ray.pipeline.parity.parity import Group, Parity

REJECTS_SHOWN = 5

HEADINGS: tuple[str, ...] = ("pass", "difference", "1 − cosine", "mean cosine", f"agreement@{NEIGHBOURS}", "shared", "bound", "")
"""Largest difference of a coordinate, largest 1 − cosine of a row, mean cosine, neighbours kept, tokens taken from a shared prefix."""

PACKAGES = ("llmemb_ray", "torch", "transformers", "vllm", "peft", "bitsandbytes")
"""Whose versions are shown; all are in the record."""


def text(parity: Parity) -> str:
    """The whole comparison: what was compared, a table for each group, what was left out, versions."""
    return "\n".join(_lines(parity))


def _lines(parity: Parity) -> Iterator[str]:
    sample = parity.sample
    yield f"{sample.source}, {int(sample.prompts.lengths.sum()):,} tokens; backend {parity.engine['backend']} ({parity.backend_why or 'as configured'})"
    for name, reason, detail in sample.rejects[:REJECTS_SHOWN]:
        yield f"makes no prompt: {name!r} ({reason}: {detail})"
    if len(sample.rejects) > REJECTS_SHOWN:
        yield f"… and {len(sample.rejects) - REJECTS_SHOWN} more make no prompt"
    for group in parity.groups:
        yield ""
        yield from _group(parity, group)
    if parity.adapter_effect is not None:
        effect = parity.adapter_effect
        yield ""
        moved = f"moves vectors by 1 − cosine up to {effect.cosine:.2g} (largest difference {effect.difference:.2g})"
        yield f"the adapter {moved if effect.difference else 'changes no vector at all'}"
        bounds = [found.bound.value for _, found in parity.comparisons if found.bound and found.bound.measure == "cosine"]
        if bounds and 0 < effect.cosine <= max(bounds):
            yield "note: that is less than the bound: whether a backend applies the adapter cannot be told here; compare with compute_dtype float32"
    yield ""
    yield ", ".join(f"{name} {parity.versions[name]}" for name in PACKAGES if name in parity.versions)


def _group(parity: Parity, group: Group) -> Iterator[str]:
    found = group.measured
    if group.name:
        yield group.name
    yield f"reference: {found.reference}, one by one, on {found.device}"
    if found.held_to != found.reference:
        yield f"bounds are against: {found.held_to}, one by one"
    for bound in dict.fromkeys(comparison.bound for comparison in found.comparisons):
        if bound is not None:
            yield f"bound: {bound}, for {bound.why}"
    for row, why in found.lost.items():
        yield f"not compared: {parity.sample.names[row]!r}: {why}"
    table = [HEADINGS]
    table += [_row(comparison) for comparison in (found.noise, found.quantised, *found.comparisons) if comparison is not None]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    words = (0, HEADINGS.index("bound"), len(HEADINGS) - 1)
    for line in table:
        cells = [f"{cell:<{width}}" if column in words else f"{cell:>{width}}" for column, (cell, width) in enumerate(zip(line, widths, strict=True))]
        yield "  ".join(cells).rstrip()
    for title, why in found.left_out.items():
        yield f"left out: {title}: {why}"


def _row(found: Comparison) -> tuple[str, ...]:
    bound = f"none: {found.why_no_bound}"
    verdict = ""
    if found.bound is not None:
        bound = str(found.bound)
        verdict = "ok" if found.passed else "BEYOND"
    if found.missing:
        verdict = f"BEYOND: {len(found.missing)} rows without a vector"
    agreement = "" if found.agreement is None else f"{found.agreement:.3f}"
    return (found.name, f"{found.difference:.1e}", f"{found.cosine:.1e}", f"{found.mean_cosine:.7f}", agreement, f"{found.shared:.0%}", bound, verdict)
