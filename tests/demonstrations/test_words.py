"""One-word answers as models give them."""

from __future__ import annotations

import pytest

from llmemb_ray.demonstrations.words import LONGEST, is_word, read


@pytest.mark.parametrize(
    ("answer", "word", "repairs"),
    [
        ("Music", "Music", ()),
        ("Horseback-riding", "Horseback-riding", ()),
        ("COVID-19", "COVID-19", ()),
        ("music", "Music", ("capital",)),
        ("don't", "Don't", ("capital",)),
        ('"Music".', "Music", ("quotes", "punctuation")),
        ("**Grief**", "Grief", ("quotes",)),
        ("“Travel.”", "Travel", ("quotes", "punctuation")),
        ("The answer is Music.", "Music", ("punctuation", "phrase")),
        ("Answer: Music", "Music", ("phrase",)),
        ("Sure! Travel", "Travel", ("phrase",)),
        ("In one word, travel", "Travel", ("phrase", "capital")),
        ("This sentence can be summed up as: Travel", "Travel", ("phrase",)),
        ("It means travel.", "Travel", ("punctuation", "phrase", "capital")),
        ('The word would be "Sadness", I think', "Sadness", ("quoted word",)),
        ('This sentence : "A man is here." means in one word:"Man', "Man", ("phrase", "quotes")),
        ("A plane", "Plane", ("article", "capital")),
        ("Joy\n\nBecause everybody laughs.", "Joy", ("first line",)),
        ("Here it is:\nJoy", "Joy", ("first line",)),
        ("<think>\nHappy? Glad?\n</think>\n\nJoy", "Joy", ("reasoning",)),
        ("हिन्दी", "हिन्दी", ()),
    ],
)
def test_an_answer_is_taken_or_repaired(answer: str, word: str, repairs: tuple[str, ...]) -> None:
    reading = read(answer)
    assert (reading.word, reading.repairs) == (word, repairs)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("<think>endless", "empty"),
        ("...", "no letters"),
        ("42", "no letters"),
        ("Two words", "several words"),
        ("I'm sorry, I cannot help with that.", "several words"),
        ("Joy/Gladness", "several words"),
        ('Either "joy" or "gladness"', "several words"),
        ("snake_case", "several words"),
        ("The", "article only"),
        ("x" * (LONGEST + 1), "too long"),
    ],
)
def test_what_is_no_word_is_dropped_with_its_reason(answer: str, reason: str) -> None:
    reading = read(answer)
    assert (reading.word, reading.reason) == (None, reason)


def test_a_continuation_ends_with_the_template_s_quote() -> None:
    assert read('music".This sentence : "x', continues=True, cut=True).word == "Music"
    assert read("Music", continues=True, cut=False).word == "Music"


def test_a_word_that_the_limit_of_tokens_ended_may_be_half_a_word() -> None:
    assert read("Mus", continues=True, cut=True).reason == "cut off"
    assert read("Mus", cut=True).reason == "cut off"
    assert read("Music\nbecause of the man's gui", cut=True).word == "Music"


def test_words_hold_hyphens_only_inside() -> None:
    assert is_word("Well-being")
    assert not any(map(is_word, ("-ness", "pre-", "a--b", "two words", "9-11", "")))
