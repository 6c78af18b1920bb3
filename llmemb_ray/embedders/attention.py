"""Attention over packed rows that share a prefix, registered with transformers as ``llmemb_packed``.

Invariant: a token attends to the shared prefix, to earlier tokens of its own row and to itself, and to
nothing else. Rows lie end to end in one sequence, so that every linear layer computes no padding; the
prefix's keys and values are computed once and read by every row.

On the CPU the two parts are computed apart and merged by their log-sum-exp, which is exact: the prefix
part is one matrix product for all rows. On CUDA ``torch.nn.attention.varlen`` takes rows of any length.

Shapes: B rows, T tokens of the pack, L longest row, P prefix tokens, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

NAME = "llmemb_packed"


@dataclass
class PrefixCache:
    """Per layer the prefix's keys and values, each [G, P, D], with positions already applied."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    hidden_PD: torch.Tensor | None = None
    """The prefix's own states at the pooled layer, for mean pooling."""


class Layout:
    """Where the rows of one pack lie.

    lengths: int64 [B] own tokens of each row; shared: prefix tokens that each row takes.
    """

    def __init__(self, lengths: np.ndarray[Any, np.dtype[np.int64]], shared: int, prefix: PrefixCache | None, *, record: bool = False) -> None:
        self.lengths, self.shared, self.prefix, self.record = lengths, shared, prefix, record
        self.longest = int(lengths.max())
        self.tokens = int(lengths.sum())
        self.uniform = bool((lengths == self.longest).all())
        self._tensors: dict[tuple[str, torch.device], torch.Tensor] = {}

    def tensor(self, name: str, device: torch.device) -> torch.Tensor:
        """One of the index tensors below on ``device``, made once a pack."""
        key = (name, device)
        if key not in self._tensors:
            tensor = torch.from_numpy(getattr(self, f"_{name}")())
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            self._tensors[key] = tensor.to(device, non_blocking=True)
        return self._tensors[key]

    def _starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    def _positions(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[T] position of each token in its whole prompt."""
        return np.arange(self.tokens) - np.repeat(self._starts()[:-1], self.lengths) + self.shared

    def _last(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[B] index of each row's last token."""
        return self._starts()[1:] - 1

    def _row(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[T] the row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def _pad(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[B * L] token at each place of the padded rectangle; padding repeats a token of its row, which causality hides."""
        places = np.minimum(np.arange(self.longest)[None, :], self.lengths[:, None] - 1)
        return (places + self._starts()[:-1, None]).reshape(-1)

    def _unpad(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[T] place of each token in the padded rectangle."""
        return self._positions() - self.shared + self._row() * self.longest

    def _cumulative_queries(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return self._starts().astype(np.int32)

    def _cumulative_keys(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        return (self._starts() + self.shared * np.arange(len(self.lengths) + 1)).astype(np.int32)

    def _key_source(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[T + B * shared] for each key of (prefix + row), row by row: its index in [prefix | pack]."""
        keys = self._cumulative_keys()
        source = np.arange(keys[-1]) - np.repeat(keys[:-1], np.diff(keys))
        starts = np.repeat(self._starts()[:-1], np.diff(keys))
        return np.where(source < self.shared, source, source + starts).astype(np.int64)


_active = threading.local()


@contextmanager
def active(layout: Layout) -> Iterator[None]:
    """Within this block, in this thread, ``llmemb_packed`` attends by ``layout``."""
    _active.layout = layout
    try:
        yield
    finally:
        _active.layout = None


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> ([1, T, H, D], None), as transformers' attention interface asks."""
    layout: Layout = _active.layout
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention has no {name}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = query[0], key[0], value[0]
    prefix = None
    if layout.prefix is not None:
        if layout.record:
            layout.prefix.layers[module.layer_idx] = (key, value)
        elif layout.shared:
            whole_key, whole_value = layout.prefix.layers[module.layer_idx]
            prefix = whole_key[:, : layout.shared], whole_value[:, : layout.shared]
    window = kwargs.get("sliding_window")
    if window is not None and layout.shared + layout.longest <= window:
        window = None
    if query.device.type == "cuda":
        out = varlen(layout, query, key, value, prefix, scaling, window)
    elif window is not None:
        out = windowed(layout, query, key, value, prefix, scaling, window)
    else:
        out = cascade(layout, query, key, value, prefix, scaling)
    return out[None], None


def cascade(
    layout: Layout, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: tuple[torch.Tensor, torch.Tensor] | None, scaling: float
) -> torch.Tensor:
    """CPU: rows against themselves, all tokens against the prefix, merged by log-sum-exp. [H, T, D] -> [T, H, D]."""
    heads = query.shape[0]
    key, value = _expand(key, heads), _expand(value, heads)
    rows = [_rectangle(layout, states) for states in (query, key, value)]
    out, lse = _flash_cpu(*rows, causal=True, scaling=scaling)  # [B, H, L, D], [B, H, L]
    out = _flatten(layout, out)  # [T, H, D]
    if prefix is None:
        return out
    prefix_key, prefix_value = (_expand(states, heads)[None] for states in prefix)
    from_prefix, prefix_lse = _flash_cpu(query[None], prefix_key, prefix_value, causal=False, scaling=scaling)
    own_lse = _flatten(layout, lse[..., None])  # [T, H, 1]
    weight = torch.sigmoid(prefix_lse[0].transpose(0, 1)[..., None] - own_lse).to(out.dtype)
    return torch.lerp(out, from_prefix[0].transpose(0, 1), weight)


def windowed(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    window: int,
) -> torch.Tensor:
    """CPU: a sliding window shorter than the longest prompt, by an explicit mask. [H, T, D] -> [T, H, D]."""
    heads = query.shape[0]
    query_BHLD, key_BHLD, value_BHLD = (_rectangle(layout, _expand(states, heads)) for states in (query, key, value))
    if prefix is not None:
        rows = len(layout.lengths)
        prefix_key, prefix_value = (_expand(states, heads).expand(rows, -1, -1, -1) for states in prefix)
        key_BHLD, value_BHLD = torch.cat([prefix_key, key_BHLD], 2), torch.cat([prefix_value, value_BHLD], 2)
    position = torch.arange(layout.shared + layout.longest, device=query.device)
    distance = position[layout.shared :, None] - position[None, :]
    mask = (distance >= 0) & (distance < window)
    return _flatten(layout, F.scaled_dot_product_attention(query_BHLD, key_BHLD, value_BHLD, attn_mask=mask, scale=scaling))


def varlen(
    layout: Layout,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
    window: int | None,
) -> torch.Tensor:
    """CUDA: rows of any length in one kernel, the prefix's keys laid before each row's. [H, T, D] -> [T, H, D]."""
    device = query.device
    query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    cumulative = layout.tensor("cumulative_queries", device)
    cumulative_keys, longest_keys = cumulative, layout.longest
    if prefix is not None:
        source = layout.tensor("key_source", device)
        key = torch.cat([prefix[0].transpose(0, 1), key])[source]
        value = torch.cat([prefix[1].transpose(0, 1), value])[source]
        cumulative_keys, longest_keys = layout.tensor("cumulative_keys", device), layout.shared + layout.longest
    attend = varlen_reference if device.type == "cpu" else _varlen_cuda
    return attend(query, key, value, cumulative, cumulative_keys, layout.longest, longest_keys, scale=scaling, window=window)


def _varlen_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative_q: torch.Tensor,
    cumulative_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    out = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cumulative_q,
        cumulative_k,
        longest_q,
        longest_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out


def varlen_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cumulative_q: torch.Tensor,
    cumulative_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """What ``varlen_attn`` computes, row by row with a dense mask, for devices without its kernel.

    query [T, H, D], key and value [K, G, D]; causal, the last query aligned with the last key. Returns [T, H, D].
    """
    out = torch.empty_like(query)
    bounds_q, bounds_k = cumulative_q.tolist(), cumulative_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)[None, :]
        mask = (distance >= 0) & (distance < (window or k1 - k0))
        heads = query.shape[1]
        row_q, row_k, row_v = (_expand(states.transpose(0, 1), heads)[None] for states in (query[q0:q1], key[k0:k1], value[k0:k1]))
        out[q0:q1] = F.scaled_dot_product_attention(row_q, row_k, row_v, attn_mask=mask.to(query.device), scale=scale)[0].transpose(0, 1)
    return out


def _flash_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash attention with its log-sum-exp, which the public function does not return."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scaling)  # type: ignore[no-any-return]
    scores = (query.float() @ key.float().transpose(-1, -2)) * scaling
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(), float("-inf"))
    return (scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)


def _expand(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[G, T, D] -> [H, T, D]: each key-value head serves its group of query heads."""
    groups = states.shape[0]
    return states if groups == heads else states.repeat_interleave(heads // groups, dim=0)


def _rectangle(layout: Layout, states: torch.Tensor) -> torch.Tensor:
    """[H, T, D] -> [B, H, L, D]."""
    heads, _, size = states.shape
    if not layout.uniform:
        states = states.index_select(1, layout.tensor("pad", states.device))
    return states.reshape(heads, len(layout.lengths), layout.longest, size).transpose(0, 1)


def _flatten(layout: Layout, states: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] -> [T, H, D]."""
    flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
    return flat if layout.uniform else flat.index_select(0, layout.tensor("unpad", states.device))


def register() -> None:
    """Makes ``llmemb_packed`` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
