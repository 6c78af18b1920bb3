"""The ``senteval`` cleaning is the literal preparation of paper 1's evaluation."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmemb_ray.errors import ConfigError
from llmemb_ray.representation import Form, Prompter, Representation
from llmemb_ray.representation.cleaning import clean
from tests.small_models import SENTENCES, tokenizer_of

TEXTS = st.one_of(st.text(), st.text(alphabet="ab .?\"'_*{}", max_size=12))


def of_the_paper(s: str) -> str:
    """Step 4 of the released ``batcher``, in its own order."""
    if len(s) > 0 and s[-1] not in ".?\"'":
        s = s + "."
    s = s.replace('"', "'")
    if len(s) > 0 and s[-1] == "?":
        s = s[:-1] + "."
    return s


@given(TEXTS)
@example("")
@example("?")
@example('"')
@example('he asked "why?"')
@example("why??")
def test_senteval_cleaning_is_the_paper_s(text: str) -> None:
    assert clean(text, "senteval") == of_the_paper(text)


@given(TEXTS)
def test_no_cleaning_changes_nothing(text: str) -> None:
    assert clean(text, "none") == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man is smoking", "A man is smoking."),
        ("What is this?", "What is this."),
        ('She said "yes"', "She said 'yes'"),
        ("it ends so!", "it ends so!."),
        ("a_b", "a_b."),
        ("trailing ", "trailing ."),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert clean(text, "senteval") == expected


@given(TEXTS)
def test_the_whole_prompt_is_stripped_as_in_the_paper(text: str) -> None:
    template = '*cls*This_sentence_:_"*sent_0*"_means_*sep+*'.replace("_", " ").replace("*sep+*", "").replace("*cls*", "")
    expected = template.replace("*sent 0*", of_the_paper(text)).strip()
    assert PROMPTER.prompt(text) == expected


def test_an_unknown_cleaning_is_refused() -> None:
    with pytest.raises(ConfigError, match="none, senteval"):
        Form(clean="sentevall")  # type: ignore[arg-type]


def _prompter() -> Prompter:
    form = Form(template='This sentence : "{text}" means ', clean="senteval")
    tokenizer = tokenizer_of(SENTENCES).backend_tokenizer.to_str()
    assert json.loads(tokenizer)
    return Prompter(Representation(document=form, query=form, max_tokens=128), "document", tokenizer_json=tokenizer, eos_id=1)


PROMPTER = _prompter()
