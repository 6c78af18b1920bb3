"""The three ways to attend over packed rows give one result, which is that of dense attention row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmemb_ray.embedders.attention import Layout, PrefixCache, cascade, varlen, windowed

SIZE = 8
SCALING = 0.3
BOUND = 2e-6

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=6)
HEADS = st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)])


class Case:
    """Random queries, keys and values of a pack, and of a prefix longer than what the rows share."""

    def __init__(self, lengths: list[int], shared: int, heads: tuple[int, int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        query_heads, groups = heads
        tokens = sum(lengths)
        self.lengths, self.shared = lengths, shared
        self.query = 3 * torch.randn(query_heads, tokens, SIZE, generator=generator)
        self.key, self.value = (torch.randn(groups, tokens, SIZE, generator=generator) for _ in range(2))
        whole = tuple(torch.randn(groups, shared + 2, SIZE, generator=generator) for _ in range(2))
        cache = PrefixCache(np.zeros(shared + 2, np.int32), {0: (whole[0], whole[1])})
        self.layout = Layout(np.array(lengths, np.int64), shared, cache if shared else None)
        self.prefix = (whole[0][:, :shared], whole[1][:, :shared]) if shared else None

    def dense(self, window: int | None = None) -> torch.Tensor:
        """[T, H, D]: softmax attention written out, one token and one head at a time."""
        heads, tokens, _ = self.query.shape
        per_group = heads // self.key.shape[0]
        out = torch.zeros(tokens, heads, SIZE)
        start = 0
        for length in self.lengths:
            for place in range(length):
                for head in range(heads):
                    group = head // per_group
                    keys, values = self.key[group, start : start + place + 1], self.value[group, start : start + place + 1]
                    if self.prefix is not None:
                        keys, values = torch.cat([self.prefix[0][group], keys]), torch.cat([self.prefix[1][group], values])
                    if window is not None:
                        keys, values = keys[-window:], values[-window:]
                    weights = torch.softmax(keys @ self.query[head, start + place] * SCALING, 0)
                    out[start + place, head] = weights @ values
            start += length
        return out


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, shared=st.sampled_from([0, 1, 7]), heads=HEADS, seed=st.integers(0, 99))
def test_cascade_varlen_and_a_wide_window_are_dense_attention(lengths: list[int], shared: int, heads: tuple[int, int], seed: int) -> None:
    case = Case(lengths, shared, heads, seed)
    arguments = (case.layout, case.query, case.key, case.value, case.prefix, SCALING)
    expected = case.dense()
    for out in (cascade(*arguments), varlen(*arguments, None), varlen(*arguments, 10_000), windowed(*arguments, 10_000)):
        assert out.shape == expected.shape
        assert (out - expected).abs().max() < BOUND


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, shared=st.sampled_from([0, 1, 7]), heads=HEADS, window=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_short_window_is_dense_attention_over_the_last_keys(lengths: list[int], shared: int, heads: tuple[int, int], window: int, seed: int) -> None:
    case = Case(lengths, shared, heads, seed)
    arguments = (case.layout, case.query, case.key, case.value, case.prefix, SCALING, window)
    expected = case.dense(window)
    for out in (varlen(*arguments), windowed(*arguments)):
        assert (out - expected).abs().max() < BOUND


def test_cascade_in_bfloat16_is_as_near_as_its_precision() -> None:
    case = Case([5, 1, 11], 7, (4, 2), 0)
    expected = case.dense()
    query, key, value = (states.bfloat16() for states in (case.query, case.key, case.value))
    assert case.prefix is not None
    prefix = (case.prefix[0].bfloat16(), case.prefix[1].bfloat16())
    out = cascade(case.layout, query, key, value, prefix, SCALING)
    assert out.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(out.float().flatten(1), expected.flatten(1)).min() > 0.9995


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_the_merge_with_the_prefix_survives_extreme_scores(scale: float) -> None:
    """Scores far above what an exponential can hold (88 in float32) must not make infinities."""
    case = Case([4, 9], 7, (4, 2), 1)
    case.query = case.query * scale
    out = cascade(case.layout, case.query, case.key, case.value, case.prefix, SCALING)
    assert math.isfinite(float(out.sum()))
    assert (out - case.dense()).abs().max() < 1e-4


@given(lengths=LENGTHS, shared=st.integers(0, 5))
def test_layout_against_a_plain_loop(lengths: list[int], shared: int) -> None:
    layout, cpu = Layout(np.array(lengths, np.int64), shared, None), torch.device("cpu")
    assert layout.tensor("positions", cpu).tolist() == [shared + place for length in lengths for place in range(length)]
    assert layout.tensor("row", cpu).tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert layout.tensor("last", cpu).tolist() == [sum(lengths[: row + 1]) - 1 for row in range(len(lengths))]
    source = []
    for row, length in enumerate(lengths):
        source += [*range(shared), *(shared + sum(lengths[:row]) + place for place in range(length))]
    assert layout.tensor("key_source", cpu).tolist() == source
