"""Which architectures may be packed and share a prefix, and which run as plain padded batches.

The table is what the tests have shown to be exact, one row a test. It is a permission, not a promise: a
loaded model must also pass ``TransformersBackend``'s self-test, and one that fails it runs padded.
"""

from __future__ import annotations

from typing import Any, Literal

Mode = Literal["packed", "padded"]

PACKED: dict[str, str] = {
    "opt": "learned positions with an offset of 2; OPT-350M's projections and post-norm too",
    "llama": "rotary positions, grouped-query attention",
    "mistral": "rotary positions, sliding window",
    "qwen2": "rotary positions, biased projections",
    "qwen3": "rotary positions, normalised queries and keys",
    "gpt2": "learned positions",
    "gpt_neox": "rotary positions on part of each head, parallel residual",
    "phi": "rotary positions on part of each head, parallel residual",
    "phi3": "rotary positions, fused projections",
    "gemma": "rotary positions, scaled embeddings, wide heads",
    "gemma3_text": "rotary positions, sliding and full layers in turn",
}
"""``model_type`` of a transformers configuration -> what the test for it covers."""

NOT_CAUSAL = {"bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "t5", "modernbert", "deberta-v2"}
"""Refused by name, with a clear message, before weights are loaded; the self-test catches the others."""


def mode(config: Any) -> Mode:
    """``packed`` where the table allows it and the configuration has nothing that the packed attention lacks."""
    if config.model_type not in PACKED:
        return "padded"
    two_way = bool(getattr(config, "use_bidirectional_attention", False))
    return "padded" if has_softcap(config) or two_way else "packed"


def has_softcap(config: Any) -> bool:
    """Whether attention scores are squashed (Gemma 2). Only transformers' ``eager`` attention does it: ``sdpa`` leaves it out silently."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def rope_switch(config: Any) -> int | None:
    """The length in tokens above which LongRoPE (Phi-3) turns *all* sequences of a forward pass by other angles; None without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    for values in (rope, *(layer for layer in rope.values() if isinstance(layer, dict))):
        if values.get("rope_type") == "longrope":
            return int(values["original_max_position_embeddings"])
    return None


def rotations(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters that ``rope_theta`` changes: the configuration's own, to be written into; none where positions are learned or ALiBi.

    Where layers of two kinds turn by different angles (Gemma 3), those of the layers that see the whole prompt.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = {name: values for name, values in rope.items() if isinstance(values, dict)}
    if "full_attention" in by_layer:
        by_layer = {"full_attention": by_layer["full_attention"]}
    chosen = list(by_layer.values()) or [rope]
    return [] if getattr(config, "alibi", False) else [values for values in chosen if "rope_theta" in values]


def takes_window(config: Any) -> bool:
    """Whether any layer goes by the configuration's ``sliding_window``; one that stands in the file of another architecture has no effect."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else hasattr(type(config), "sliding_window")


def max_positions(config: Any) -> int | None:
    """The longest sequence in tokens that the model has positions for; None where it has no such limit (ALiBi)."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
