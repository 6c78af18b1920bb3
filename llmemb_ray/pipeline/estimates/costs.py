"""What a model's forward passes take: operations, memory, GPU hours, money. From its configuration alone, no weights.

Invariant: operations are those of the matrix products and of causal attention, two for a multiplication and an
addition; norms, activations, token embeddings and padding are left out. Knows no corpus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmemb_ray import engines
from llmemb_ray.config import EmbedSettings
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.pipeline.estimates import gpus
from llmemb_ray.pipeline.estimates.gpus import Gpu

Counts = npt.NDArray[np.int64]
Range = tuple[float, float]

WEIGHT_SHARE = 0.8
"""Of a GPU's memory the weights may take so much; the rest is for activations."""


@dataclass(frozen=True, kw_only=True)
class Hours:
    """GPU hours and cost on one kind of GPU, as ranges (least, most)."""

    gpu: str | None
    """None for a throughput that the user has measured."""
    gpus_per_actor: int
    tokens_per_s: Range
    """Prompt tokens a second, of one GPU."""
    gpu_hours: Range
    price: float | None
    """Of one GPU for an hour."""
    currency: str | None
    """Of the price list; None for a price that the user has given."""
    cost: Range | None


def attention_flops(config: Any, lengths: Counts, shared: Counts) -> float:
    """Operations of causal attention for prompts of ``lengths`` [M] whose first ``shared`` [M] tokens are not computed.

    A token at position p (from 1) multiplies its query with p keys and its weights with p values, in each layer and head:
    4 x p x (heads x head size) operations. A sliding window bounds p.
    """
    heads = getattr(config, "num_attention_heads", 0)
    size = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) is not False else None
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * int(config.num_hidden_layers)
    full, sliding = kinds.count("full_attention"), kinds.count("sliding_attention")
    keys = full * float((_keys(lengths, None) - _keys(shared, None)).sum()) + sliding * float((_keys(lengths, window) - _keys(shared, window)).sum())
    return float(4 * size * keys)


def _keys(lengths: Counts, window: int | None) -> npt.NDArray[np.float64]:
    """Sum over the positions 1 … n of the keys that each sees."""
    n = lengths.astype(np.float64)
    if not window:
        window = 2**62
    inside = np.minimum(n, window)
    keys: npt.NDArray[np.float64] = inside * (inside + 1) / 2 + (n - inside) * window
    return keys


def parameters(spec: EmbedderSpec, config: Any) -> float:
    """Weights of the layers and the token embeddings, about."""
    return spec.model_flops / 2 + float(config.vocab_size * (getattr(config, "word_embed_proj_dim", None) or config.hidden_size))


def weight_bytes(spec: EmbedderSpec, config: Any, compute_dtype: models.ComputeDtype) -> float:
    """Bytes of the weights as a GPU holds them; of a quantised model the token embeddings stay in the compute dtype."""
    each = models.DTYPE_BYTES[models.resolve_dtype(compute_dtype, "cuda")]
    layers = spec.model_flops / 2
    format_ = engines.WEIGHT_FORMATS.get(spec.stored or spec.quantization)
    return layers * (format_.bytes if format_ else each) + (parameters(spec, config) - layers) * each


def gpus_needed(weights: float, gpu: Gpu) -> int:
    """How many of these GPUs hold ``weights`` bytes."""
    return max(1, math.ceil(weights / (WEIGHT_SHARE * gpu.memory)))


def hours(
    settings: EmbedSettings,
    spec: EmbedderSpec,
    *,
    weights: float,
    flops: float,
    tokens: int,
    margin: float,
    gpu: str | None,
    throughput: float | None,
    utilization: Range,
) -> list[Hours]:
    """A line for the throughput given, or for ``gpu``, or for each GPU of the table; none for actors without GPUs.

    margin: share by which ``tokens`` may be off either way. Raises ConfigError for a GPU that is not in the table.
    """
    one = gpus.find(gpu) if gpu else None
    if throughput:
        took = tokens / throughput / 3600
        price = settings.price or (one.price if one else None)
        holding = max(1, math.ceil(settings.gpus_per_actor or settings.tensor_parallel))
        currency = gpus.CURRENCY if one and not settings.price else None
        return [_line(gpu=one.name if one else None, each=holding, tokens=tokens, took=(took, took), margin=margin, price=price, currency=currency)]
    if settings.gpus_per_actor == 0 and one is None:
        return []
    lines = []
    for here in (one,) if one else gpus.GPUS:
        holding = max(gpus_needed(weights, here), math.ceil(settings.gpus_per_actor or settings.tensor_parallel))
        # The transformers backend spreads layers over GPUs that then work one after the other: all are paid, one computes.
        idle = holding if spec.backend == "hf" else 1
        least, most = (flops * idle / (here.bf16 * share) / 3600 for share in (utilization[1], utilization[0]))
        own = settings.price if one else None
        currency = None if own else gpus.CURRENCY
        lines.append(_line(gpu=here.name, each=holding, tokens=tokens, took=(least, most), margin=margin, price=own or here.price, currency=currency))
    return lines


def _line(*, gpu: str | None, each: int, tokens: int, took: Range, margin: float, price: float | None, currency: str | None) -> Hours:
    """took: GPU hours of just ``tokens`` tokens, which may be off by ``margin``."""
    least, most = took[0] * max(0.0, 1 - margin), took[1] * (1 + margin)
    return Hours(
        gpu=gpu,
        gpus_per_actor=each,
        tokens_per_s=(tokens / (took[1] * 3600), tokens / (took[0] * 3600)) if tokens else (0.0, 0.0),
        gpu_hours=(least, most),
        price=price,
        currency=currency,
        cost=(least * price, most * price) if price is not None else None,
    )
