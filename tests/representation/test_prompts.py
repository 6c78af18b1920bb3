"""Tokens of a row are those of its whole prompt, by transformers' own tokenizers; a long text loses its end, never the template's."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmemb_ray.embedders.models import TokenizerSource, load_tokenizer
from llmemb_ray.errors import ConfigError
from llmemb_ray.representation import Demonstration, Form, Prompter, Representation, TokenRows, preset, templates
from llmemb_ray.representation.cleaning import clean
from llmemb_ray.representation.prompts import MIN_SHARED_TOKENS
from tests.small_models import SENTENCES, tokenizer_of

NASTY = [
    *SENTENCES,
    "",
    "?",
    '"',
    "'s",
    'ends in a quote"',
    " starts with a blank",
    "two  blanks   three",
    "\u00a0no-break\u2009thin",
    "e\u0301 combining",
    "العربية עברית हिन्दी ไทย",
    "\ufeffBOM and \u200bzero width",
    "123" * 20,
    "a" * 200,
    "{text} {} {{x}}",
    "<s> </s> <pad> <unk> <|endoftext|>",
    "line\r\nbreaks\n\n\n",
]

KINDS = ("opt", "gpt2", "llama2", "mistral", "tinystories")
DEMO = Demonstration("A jockey riding a horse.", "Equestrian")
FORMS = {
    "prompteol": preset("prompteol"),
    "prompteol-icl": preset("prompteol-icl", demonstrations=(DEMO,)),
    "prompteol, senteval": preset("prompteol", clean="senteval"),
    "e5": preset("e5", instruction="Retrieve semantically similar text."),
    "none": preset("none"),
    "none, senteval": preset("none", clean="senteval"),
    "own": preset('  {{"t": "{text}"}}\t'),
}


@cache
def reference(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def prompter_of(directory: Path, forms: tuple[Form, Form, bool], role: str = "document", **changes: Any) -> Prompter:
    tokenizer = source(directory)
    representation = Representation(document=forms[0], query=forms[1], append_eos=forms[2], **({"max_tokens": 512} | changes))
    return Prompter(representation, role, tokenizer_json=tokenizer.json, eos_id=tokenizer.eos_id)  # type: ignore[arg-type]


@cache
def source(directory: Path) -> TokenizerSource:
    return load_tokenizer(directory)


def whole_prompt(form: Form, text: str) -> str:
    filled = form.template.format(text=clean(text, form.clean))
    return filled.strip() if form.clean == "senteval" else filled


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_prompt(kind: str, form: str, tokenizers: dict[str, Path]) -> None:
    prompter, tokenizer, forms = prompter_of(tokenizers[kind], FORMS[form]), reference(tokenizers[kind]), FORMS[form]
    rows, unfit = prompter.tokenize(NASTY)
    for index, text in enumerate(NASTY):
        expected = tokenizer(whole_prompt(forms[0], text))["input_ids"] + ([tokenizer.eos_token_id] if forms[2] else [])
        if unfit[index] is not None:
            assert not len(rows[index])
            assert len(expected) == int(forms[2]), text
            continue
        assert rows[index].tolist() == expected, text
    assert not rows.truncated.any()


def test_opt_prompts_begin_with_the_token_that_the_paper_s_code_had(tokenizers: dict[str, Path]) -> None:
    rows, _ = prompter_of(tokenizers["opt"], FORMS["prompteol"]).tokenize(["A man is smoking."])
    assert rows[0][0] == 2
    assert (rows[0] == 2).sum() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_gluing_pieces_would_give_other_tokens(kind: str, tokenizers: dict[str, Path]) -> None:
    """The nasty sentences do cross the border: tokenising template and text apart is not what the prompter does."""
    tokenizer, (before, after) = reference(tokenizers[kind]), templates.split(templates.PROMPTEOL)
    rows, _ = prompter_of(tokenizers[kind], FORMS["prompteol"]).tokenize(NASTY)

    def ids(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False)["input_ids"])

    glued = [ids(before) + ids(text) + ids(after) for text in NASTY]
    assert any(row != pieces and row[1:] != pieces for row, pieces in zip([rows[i].tolist() for i in range(len(rows))], glued, strict=True))


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_any_text_small_vocabulary(texts: list[str]) -> None:
    tokenizer = tokenizer_of()
    forms = FORMS["prompteol"]
    prompter = Prompter(Representation(document=forms[0], max_tokens=512), "document", tokenizer_json=tokenizer.backend_tokenizer.to_str(), eos_id=1)
    rows, unfit = prompter.tokenize(texts)
    assert unfit == [None] * len(texts)
    for index, text in enumerate(texts):
        assert rows[index].tolist() == tokenizer(templates.PROMPTEOL.format(text=text))["input_ids"]


HUGE = {"words": "The quick brown fox. " * 500_000, "one-word": "x" * 10_000_000, "han": "数" * 3_400_000, "letters": " a" * 5_000_000}


def long_texts() -> list[str]:
    return [
        "The quick brown fox jumps over the lazy dog. " * 200,
        "naïve café 数据科学很有趣。 😀👩‍👩‍👧‍👦 " * 100,
        "x" * 3000,
        "word\n\n  " * 500,
        '"quoted" ' * 300,
        "😀" * 800,
        " " * 30 + "A man is playing a guitar. " * 100,
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_cut_and_never_the_template(kind: str, form: str, tokenizers: dict[str, Path]) -> None:
    max_tokens, texts, forms = 96, long_texts(), FORMS[form]
    prompter, tokenizer = prompter_of(tokenizers[kind], forms, max_tokens=max_tokens), reference(tokenizers[kind])
    rows, unfit = prompter.tokenize([*texts, "short"])
    assert unfit == [None] * len(rows)
    eos = [tokenizer.eos_token_id] if forms[2] else []
    for index, text in enumerate(texts):
        ids = rows[index].tolist()
        assert rows.truncated[index] == (len(tokenizer(whole_prompt(forms[0], text))["input_ids"]) + len(eos) > max_tokens)
        if not rows.truncated[index]:  # such as emoji of a vocabulary that makes one <unk> of them all
            continue
        assert max_tokens - 8 <= len(ids) <= max_tokens, (text[:20], len(ids))
        if eos:
            assert ids[-1] == eos[0]
            ids = ids[:-1]
        # Some beginning of the text must explain the tokens: the prompt of that piece, tokenised at once.
        assert any(tokenizer(whole_prompt(forms[0], text[:cut]))["input_ids"] == ids for cut in range(1, 20 * max_tokens)), text[:20]


def test_a_cut_prompt_still_ends_with_the_template(tokenizers: dict[str, Path]) -> None:
    tokenizer = reference(tokenizers["gpt2"])
    rows, _ = prompter_of(tokenizers["gpt2"], FORMS["prompteol"], max_tokens=40).tokenize(long_texts())
    for index in range(len(rows)):
        decoded = tokenizer.decode(rows[index])
        assert decoded.startswith('This sentence : "')
        assert decoded.endswith('" means in one word:"')


@pytest.mark.parametrize("excess", [-1, 0, 1])
def test_the_limit_is_met_to_the_token(excess: int, tokenizers: dict[str, Path]) -> None:
    text = "A man is playing a guitar."
    length = len(reference(tokenizers["llama2"])(templates.PROMPTEOL.format(text=text))["input_ids"])
    rows, _ = prompter_of(tokenizers["llama2"], FORMS["prompteol"], max_tokens=length - excess).tokenize([text])
    assert bool(rows.truncated[0]) == (excess > 0)
    assert len(rows[0]) == length - max(0, excess)


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize("kind", ["opt", "llama2"])
def test_ten_megabytes_take_no_time(kind: str, text: str, tokenizers: dict[str, Path]) -> None:
    prompter = prompter_of(tokenizers[kind], FORMS["prompteol"])
    started = time.process_time()
    rows, unfit = prompter.tokenize([text])
    assert time.process_time() - started < 5
    assert unfit == [None]
    assert rows.truncated.all()
    assert 500 <= rows.lengths[0] <= 512


def test_a_template_that_leaves_no_room_is_refused(tokenizers: dict[str, Path]) -> None:
    bare = len(reference(tokenizers["gpt2"])(templates.PROMPTEOL.format(text=""))["input_ids"])
    prompter_of(tokenizers["gpt2"], FORMS["prompteol"], max_tokens=bare + 1)
    with pytest.raises(ConfigError, match="max_tokens"):
        prompter_of(tokenizers["gpt2"], FORMS["prompteol"], max_tokens=bare)


def test_a_text_whose_first_character_does_not_fit_is_unfit(tokenizers: dict[str, Path]) -> None:
    """One token of room, and a character of several tokens: the row is told apart, its neighbours are not harmed."""
    prompt = templates.PROMPTEOL
    tokenizer = reference(tokenizers["gpt2"])
    limit = len(tokenizer(prompt.format(text="man"))["input_ids"])
    rows, unfit = prompter_of(tokenizers["gpt2"], FORMS["prompteol"], max_tokens=limit).tokenize(["man", "\U0001f9ff", "man"])
    assert [problem and problem.reason for problem in unfit] == [None, "no_room", None]
    assert unfit[1] is not None
    assert str(limit) in unfit[1].detail
    assert rows.lengths.tolist() == [limit, 0, limit]
    assert rows.truncated.tolist() == [False] * 3


def test_a_text_of_no_tokens_is_unfit(tokenizers: dict[str, Path]) -> None:
    _, unfit = prompter_of(tokenizers["gpt2"], FORMS["none"]).tokenize(["", "a"])
    assert [problem and problem.reason for problem in unfit] == ["no_tokens", None]
    _, unfit = prompter_of(tokenizers["gpt2"], FORMS["e5"], role="document").tokenize([""])
    assert unfit == [None]  # the instruction alone makes tokens


@pytest.mark.parametrize("adds_itself", [False, True])
def test_e5_ends_with_one_eos(adds_itself: bool) -> None:
    from tokenizers import Tokenizer, processors

    tokenizer = Tokenizer.from_str(tokenizer_of().backend_tokenizer.to_str())
    if adds_itself:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    forms = FORMS["e5"]
    representation = Representation(document=forms[0], query=forms[1], append_eos=True, max_tokens=60)
    rows, unfit = Prompter(representation, "query", tokenizer_json=tokenizer.to_str(), eos_id=1).tokenize(["a man", "a man " * 200])
    assert unfit == [None, None]
    for index in range(2):
        ids = rows[index].tolist()
        assert ids[0] == 0
        assert ids[-1] == 1
        assert ids.count(1) == 1
    assert rows.truncated.tolist() == [False, True]
    assert rows.lengths[1] <= 60


def test_eos_is_needed_to_append_it() -> None:
    with pytest.raises(ConfigError, match="EOS"):
        Prompter(Representation(append_eos=True, max_tokens=60), "query", tokenizer_json=tokenizer_of().backend_tokenizer.to_str(), eos_id=None)


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_texts_share_the_prefix(kind: str, tokenizers: dict[str, Path]) -> None:
    prompter = prompter_of(tokenizers[kind], FORMS["prompteol-icl"])
    prefix = prompter.shared_prefix
    rows, _ = prompter.tokenize(["Two dogs run.", "It rains.", "Why not?"])
    bare = len(reference(tokenizers[kind])(templates.split(FORMS["prompteol-icl"][0].template)[0])["input_ids"])
    assert bare - 2 <= len(prefix) <= bare
    assert rows.shared(prefix).tolist() == [len(prefix)] * 3


def test_no_prefix_where_there_is_no_template(tokenizers: dict[str, Path]) -> None:
    assert len(prompter_of(tokenizers["opt"], FORMS["none"]).shared_prefix) == 0


SMALL_ROWS = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=8)


@given(rows=SMALL_ROWS, prefix=st.lists(st.integers(0, 2), max_size=8))
def test_shared_against_a_plain_loop(rows: list[list[int]], prefix: list[int]) -> None:
    expected = []
    for row in rows:
        count = 0
        while count < len(prefix) and count < len(row) - 1 and row[count] == prefix[count]:
            count += 1
        expected.append(count if count >= MIN_SHARED_TOKENS else 0)
    assert TokenRows.from_lists(rows).shared(np.asarray(prefix, np.int32)).tolist() == expected


@given(rows=SMALL_ROWS)
def test_rows_are_laid_end_to_end(rows: list[list[int]]) -> None:
    laid = TokenRows.from_lists(rows)
    assert len(laid) == len(rows)
    assert laid.lengths.tolist() == [len(row) for row in rows]
    assert [laid[index].tolist() for index in range(len(rows))] == rows
