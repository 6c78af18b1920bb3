"""Tokens made from those of the template without its demonstrations are the whole prompt's, by transformers' own tokenizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmemb_ray.representation import Demonstration, preset, prompts
from tests.representation.test_prompts import KINDS, NASTY, long_texts, prompter_of, reference, whole_prompt
from tests.small_models import tokenizer_of

TEXTS = [*NASTY, *(f"{text} again." for text in NASTY), *(f"Number {number} of the men plays {number} guitars." for number in range(60))]
DEMONSTRATIONS = [
    Demonstration("A jockey riding a horse.", "Equestrian"),
    Demonstration("relating to switzerland or its people.", "Swiss"),
    Demonstration("Ends in no full stop", "数据"),
    Demonstration(' «Blanks», {braces} and "quotes" ', "'s"),
]


@pytest.mark.parametrize("clean", ["none", "senteval"])
@pytest.mark.parametrize("kind", KINDS)
def test_extended_tokens_are_those_of_the_whole_prompt(kind: str, clean: str, tokenizers: dict[str, Path]) -> None:
    base, tokenizer = prompter_of(tokenizers[kind], preset("prompteol", clean=clean), max_tokens=2048), reference(tokenizers[kind])  # type: ignore[arg-type]
    rows, _ = base.tokenize(TEXTS)
    for demonstrations in [*((one,) for one in DEMONSTRATIONS), tuple(DEMONSTRATIONS)]:
        forms = preset("prompteol-icl", demonstrations=demonstrations, clean=clean)  # type: ignore[arg-type]
        extended, unfit, again = prompter_of(tokenizers[kind], forms, max_tokens=2048).extend(base, rows, TEXTS)
        assert unfit == [None] * len(TEXTS)
        assert again == 0
        for row, text in enumerate(TEXTS):
            assert extended[row].tolist() == tokenizer(whole_prompt(forms[0], text))["input_ids"], text


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_are_tokenised_again_and_cut_as_ever(kind: str, tokenizers: dict[str, Path]) -> None:
    base = prompter_of(tokenizers[kind], preset("prompteol"), max_tokens=100)
    longer = prompter_of(tokenizers[kind], preset("prompteol-icl", demonstrations=(DEMONSTRATIONS[0],)), max_tokens=100)
    texts = ["Short.", *long_texts(), "A text of middling length, " * 12, "Another short one."]
    rows, _ = base.tokenize(texts)
    expected, problems = longer.tokenize(texts)
    extended, unfit, again = longer.extend(base, rows, texts)
    assert np.array_equal(extended.ids, expected.ids)
    assert np.array_equal(extended.offsets, expected.offsets)
    assert np.array_equal(extended.truncated, expected.truncated)
    assert [bool(problem) for problem in unfit] == [bool(problem) for problem in problems]
    cut = [bool(truncated or problem) for truncated, problem in zip(expected.truncated, problems, strict=True)]
    assert 0 < again == sum(cut) < len(texts)


def test_a_vocabulary_that_reaches_over_the_border_is_tokenised_whole(monkeypatch: pytest.MonkeyPatch, tokenizers: dict[str, Path]) -> None:
    """TinyStories has no pre-tokeniser: with no sure border to be had, nothing is taken from the base."""
    base = prompter_of(tokenizers["tinystories"], preset("prompteol"))
    longer = prompter_of(tokenizers["tinystories"], preset("prompteol-icl", demonstrations=(DEMONSTRATIONS[0],)))
    monkeypatch.setattr(prompts, "_never_one_token", lambda *_: False)
    extended, _, again = longer.extend(base, base.tokenize(TEXTS)[0], TEXTS)
    assert again == len(TEXTS)
    assert np.array_equal(extended.ids, longer.tokenize(TEXTS)[0].ids)


def test_a_merge_over_a_border_is_seen() -> None:
    """In this vocabulary one token holds the end of the template and the beginning of a text."""
    plain, merging = tokenizer_of().backend_tokenizer, tokenizer_of(['xx"a'] * 200).backend_tokenizer
    merging.pre_tokenizer = None
    for tokenizer in (plain, merging):
        over = any('"a' in piece for piece in tokenizer.get_vocab())
        assert prompts._never_one_token(tokenizer.to_str(), '"', "a") is not over
    assert not prompts._never_one_token(plain.to_str(), "e", "n")  # 'sentence'


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40), sentence=st.text(min_size=1, max_size=20), word=st.text(min_size=1, max_size=8))
def test_any_text_and_demonstration(text: str, sentence: str, word: str) -> None:
    from llmemb_ray.representation import Prompter, Representation

    serialised = tokenizer_of().backend_tokenizer.to_str()
    icl = preset("prompteol-icl", demonstrations=(Demonstration(sentence, word),))
    base, longer = (
        Prompter(Representation(document=forms[0], max_tokens=1024), "document", tokenizer_json=serialised, eos_id=1) for forms in (preset("prompteol"), icl)
    )
    extended, _, _ = longer.extend(base, base.tokenize([text])[0], [text])
    assert np.array_equal(extended.ids, longer.tokenize([text])[0].ids)
