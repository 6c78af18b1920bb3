"""Chunks: in order, complete, small enough, cut where a reader would cut."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llmemb_ray.corpus.chunking import Chunking, Span, chunks
from llmemb_ray.embedders.models import load_tokenizer

PROSE = (
    "The river rises in the hills. It runs past three mills! Does it freeze in winter? Only at its mouth… "
    "There the ice is thick enough for carts. Nobody knows why.\n\nIn spring the meadows are under water. "
    "Then the storks come, and the frogs are afraid of them."
)


def cut(tokenizer: Tokenizer, text: str, tokens: int, overlap: int = 0) -> list[Span]:
    offsets = np.asarray(tokenizer.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
    return chunks(text, offsets, Chunking(tokens=tokens, overlap=overlap))


@pytest.fixture(scope="module", params=["gpt2", "llama2", "mistral"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Path]) -> Tokenizer:
    """Real vocabularies: bytes (whose tokens bring the space before a word along) and SentencePiece."""
    return Tokenizer.from_str(load_tokenizer(tokenizers[request.param]).json)


def count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def test_a_text_that_fits_is_one_chunk_untouched(tokenizer: Tokenizer) -> None:
    text = "  short, with white space at both ends \n"
    assert cut(tokenizer, text, 64) == [(0, len(text))]
    assert cut(tokenizer, "", 64) == [(0, 0)]


def test_chunks_end_with_sentences_where_there_are_some(tokenizer: Tokenizer) -> None:
    spans = cut(tokenizer, PROSE, 24)
    assert len(spans) >= 3
    assert [PROSE[start:end][-1] in ".!?…" for start, end in spans] == [True] * len(spans)
    assert all(PROSE[start].isupper() for start, _ in spans)


def test_a_sentence_too_long_is_cut_between_words(tokenizer: Tokenizer) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen " * 4
    for start, end in cut(tokenizer, text, 10):
        assert text[start:end].split() == [word for word in text[start:end].split() if word in text.split()]


def test_a_word_too_long_is_cut_inside(tokenizer: Tokenizer) -> None:
    text = "x" * 500
    spans = cut(tokenizer, text, 8)
    assert "".join(text[start:end] for start, end in spans) == text
    assert len(spans) > 3


def test_chinese_sentences_are_borders_without_any_space(tokenizer: Tokenizer) -> None:
    text = "数据科学很有趣。我们今天去公园散步。天气非常好！你想一起来吗？" * 3
    spans = cut(tokenizer, text, 60)
    assert len(spans) > 1
    assert sum(text[end - 1] in "。！？" for _, end in spans) >= len(spans) - 1


def test_an_overlap_repeats_the_end_of_the_chunk_before_from_a_border_on(tokenizer: Tokenizer) -> None:
    spans = cut(tokenizer, PROSE, 24, overlap=10)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert count(tokenizer, PROSE[start:end]) <= 11
        assert start == 0 or PROSE[start - 1].isspace()
    assert any(start < end for (_, end), (start, _) in itertools.pairwise(spans))


TEXT = st.text(alphabet=st.sampled_from("ab cde. \n!?。数据😀é\t"), max_size=400)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, tokens=st.integers(1, 40), data=st.data())
def test_chunks_hold_all_of_the_text_in_order_and_none_is_too_long(tokenizer: Tokenizer, text: str, tokens: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tokens // 2))
    spans = cut(tokenizer, text, tokens, overlap)
    covered = np.zeros(len(text), np.bool_)
    for start, end in spans:
        assert 0 <= start <= end <= len(text)
        covered[start:end] = True
    assert all(character.isspace() for character, held in zip(text, covered, strict=True) if not held)
    assert [start for start, _ in spans] == sorted({start for start, _ in spans}), "each chunk begins behind the one before"
    assert [end for _, end in spans] == sorted({end for _, end in spans}), "and ends behind it"
    if len(spans) > 1:
        assert max(count(tokenizer, text[start:end]) for start, end in spans) <= tokens + 6


def test_a_large_text_is_cut_in_reasonable_time(tokenizer: Tokenizer) -> None:
    text = PROSE * 4000
    offsets = np.asarray(tokenizer.encode(text, add_special_tokens=False).offsets, np.int64)
    started = time.perf_counter()
    spans = chunks(text, offsets, Chunking(tokens=256, overlap=32))
    assert time.perf_counter() - started < 10
    assert spans[-1][1] == len(text)
