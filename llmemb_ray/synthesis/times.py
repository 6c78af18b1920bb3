"""How long so many requests take: of an endpoint by its limits, of a loaded model by operations and memory traffic on rented GPUs.

Invariant: every figure here is an estimate from assumptions that stand as constants below; a pilot's own rate takes their place. Knows no prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from llmemb_ray.config import SynthesizeSettings
from llmemb_ray.embedders import models
from llmemb_ray.pipeline.estimates import costs, gpus
from llmemb_ray.pipeline.estimates.costs import Range
from llmemb_ray.pipeline.estimates.gpus import Gpu
from llmemb_ray.synthesis.commits import Made

SPEED: Range = (20.0, 100.0)
"""Tokens a second of one answer of an endpoint; what services for large and small models are reported to reach. Not measured here."""

FIRST_TOKEN = 0.5
"""Seconds until an endpoint's answer begins."""

MINUTE = 60.0

BANDWIDTH = {"L4": 300e9, "A10G": 600e9, "A100": 2039e9, "H100": 3350e9, "H200": 4800e9, "B200": 7700e9}
"""Bytes a second of a GPU's memory: NVIDIA's data sheets, of the same cards as ``gpus.GPUS``."""

BANDWIDTH_SHARE: Range = (0.4, 0.8)
"""Of the bandwidth that is reached. Not measured here."""

MEMORY_SHARE = 0.9
"""Of a GPU's memory that weights and caches take: vLLM's own default."""

BATCH = {"vllm": 256, "transformers": 16}
"""Answers that are written at once at most: vLLM's smallest default on GPUs, and ``generation.local.BATCH``."""


@dataclass(frozen=True, kw_only=True)
class Elapsed:
    """seconds: least and most; binds: which setting, or that it went no faster so far, decides them, at the one end and the other."""

    seconds: Range
    binds: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class GpuTime:
    """A loaded model on one kind of GPU, as ranges (least, most)."""

    gpu: str
    gpus_per_actor: int
    batch: int
    """Answers that are written at once."""
    tokens_per_s: Range
    """Of answers, of one actor."""
    gpu_hours: Range
    price: float
    """Of one GPU for an hour, in ``gpus.CURRENCY``."""
    cost: Range


def elapsed(settings: SynthesizeSettings, *, requests: float, prompt_tokens: float, answer_tokens: float, rate: float | None = None) -> Elapsed:
    """Time of so many requests with so many tokens in all. rate: requests a second that a pilot had, in place of ``SPEED``.

    The limits are counted in a sliding window, so that what a minute allows begins at once.
    """
    limits = {}
    if settings.requests_per_minute:
        limits["requests_per_minute"] = max(0.0, requests / settings.requests_per_minute - 1) * MINUTE
    if settings.tokens_per_minute:
        limits["tokens_per_minute"] = max(0.0, (prompt_tokens + answer_tokens) / settings.tokens_per_minute - 1) * MINUTE
    ends = []
    for speed in reversed(SPEED):
        at_work = min(settings.concurrency, max(1.0, requests))
        asking = requests / rate if rate else (answer_tokens / speed + requests * FIRST_TOKEN) / at_work
        took = {"the speed so far" if rate else "concurrency": asking, **limits}
        ends.append(max(took.items(), key=lambda item: item[1]))
    return Elapsed(seconds=(ends[0][1], ends[1][1]), binds=(ends[0][0], ends[1][0]))


def engine_of(settings: SynthesizeSettings) -> str:
    """What would run a model on a GPU: vLLM may be installed there though it is not here."""
    return "vllm" if settings.engine == "auto" else settings.engine


def assumptions(settings: SynthesizeSettings, *, rate: float | None) -> list[str]:
    """What times rest on."""
    if rate is not None:
        return [f"it goes on with {rate:,.2f} requests a second, as the units that are there were made: with the same concurrency, or actors, and endpoint"]
    if settings.llm is not None:
        low, high = SPEED
        return [
            f"each of {settings.concurrency:,} requests at once is answered with {low:g} to {high:g} tokens a second after {FIRST_TOKEN:g} s, as services are "
            "reported to; not measured",
        ]
    low, high = BANDWIDTH_SHARE
    several = "" if engine_of(settings) == "vllm" else "; an answer waits for the longest of its batch, which is not counted: expect a multiple"
    return [
        f"{engine_of(settings)} writes {BATCH[engine_of(settings)]} answers at once where memory allows, reaches {low:.0%} to {high:.0%} of a GPU's memory "
        f"bandwidth, and of its bf16 rate what `llmemb plan` assumes; not measured, weights reckoned unquantised{several}",
        f"prices are those of {gpus.PRICED} of the {gpus.PRICE_LIST}; loading the model and idle GPUs are not counted",
    ]


def measured_rate(commits: Iterable[Made]) -> float | None:
    """Requests a second while units were at work, pauses between commands left out; None where that cannot be told."""
    rows, busy, until = 0, 0.0, float("-inf")
    for began, ended, count in sorted((commit.finished - commit.seconds, commit.finished, commit.rows) for commit in commits):
        rows += count
        busy += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return rows / busy if rows and busy else None


def on_gpus(settings: SynthesizeSettings, config: Any, *, requests: float, prompt_tokens: float, answer_tokens: float, utilization: Range) -> list[GpuTime]:
    """A line for each GPU of the table. config: of the model; utilization: share of a GPU's bf16 rate, as the plan of an embedding assumes it."""
    engine = engine_of(settings)
    return [_on(gpu, settings, config, engine, max(1.0, requests), prompt_tokens, answer_tokens, utilization) for gpu in gpus.GPUS]


def _on(
    gpu: Gpu, settings: SynthesizeSettings, config: Any, engine: str, requests: float, prompt_tokens: float, answer_tokens: float, utilization: Range
) -> GpuTime:
    """Prompts by operations; each token of an answer by operations or, if that is longer, by reading the weights and the caches."""
    dtype = models.resolve_dtype(settings.compute_dtype, "cuda")
    weights = models.parameters(config) * models.DTYPE_BYTES[dtype]
    cache = models.cache_bytes_per_token(config, dtype) if hasattr(config, "num_attention_heads") else 0
    holding = max(costs.gpus_needed(weights, gpu), settings.tensor_parallel, ceil(settings.gpus_per_actor or 1))
    longest = (prompt_tokens + answer_tokens) / requests
    room = MEMORY_SHARE * gpu.memory * holding - weights
    batch = int(max(1, min(BATCH[engine], requests, room / max(1.0, cache * longest))))
    cached = batch * cache * (prompt_tokens + answer_tokens / 2) / requests
    together = holding if engine == "vllm" else 1  # transformers spreads layers over GPUs that then work one after the other.

    def seconds(compute_share: float, bandwidth_share: float) -> float:
        operations = gpu.bf16 * compute_share * together
        step = max(batch * 2 * models.parameters(config) / operations, (weights + cached) / (BANDWIDTH[gpu.name] * bandwidth_share * together))
        return prompt_tokens * models.flops_per_token(config) / operations + answer_tokens / batch * step

    fast, slow = seconds(utilization[1], BANDWIDTH_SHARE[1]), seconds(utilization[0], BANDWIDTH_SHARE[0])
    hours = (fast * holding / 3600, slow * holding / 3600)
    return GpuTime(
        gpu=gpu.name,
        gpus_per_actor=holding,
        batch=batch,
        tokens_per_s=(answer_tokens / slow, answer_tokens / fast) if answer_tokens else (0.0, 0.0),
        gpu_hours=hours,
        price=gpu.price,
        cost=(hours[0] * gpu.price, hours[1] * gpu.price),
    )
