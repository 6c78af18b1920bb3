"""Answers written by hand, good and bad, for every family and every reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmemb_ray.generation.generator import Answer
from llmemb_ray.synthesis.checks import Example, Problem, Reason, read
from llmemb_ray.synthesis.drawing import Request

SHORT_LONG = {
    "user_query": "how long does sourdough take to rise",
    "positive_document": "Sourdough rises slowly because wild yeast multiplies at its own pace. " * 5,
    "hard_negative_document": "Packaged yeast makes bread dough rise within a single hour. " * 6,
}
LONG_SHORT = {"input_text": "The parcel came two weeks late and nobody replied.", "label": "slow delivery", "misleading_label": "damaged goods"}
STS = {"S1": "A man is playing the guitar.", "S2": "A man plays guitar.", "S3": "A woman is playing the flute."}
BITEXT = {
    "S1": "The train to Berlin leaves at nine in the morning.",
    "S2": "Der Zug nach Berlin fährt um neun Uhr morgens ab.",
    "S3": "Der Zug nach Hamburg fährt um acht Uhr abends ab.",
}
LONG = {"input": "The court held that the contract was void. " * 40, "positive_document": "A second panel reached the same view last spring. " * 40}
SHORT = {"input": "A stitch in time", "positive_document": "saves nine"}
EXAMPLES: dict[str, dict[str, str]] = {
    "short-long": SHORT_LONG,
    "long-short": LONG_SHORT,
    "sts": STS,
    "bitext": BITEXT,
    "long-long": LONG,
    "short-short": SHORT,
}
DRAWN = {
    "short-long": {"query_length": "5 to 15 words", "num_words": "50"},
    "long-short": {"num_words": "less than 10"},
    "bitext": {"unit": "sentence", "src_lang": "English", "tgt_lang": "German"},
}


def request(family: str, language: str = "en", **placeholders: str) -> Request:
    drawn = DRAWN.get(family, {}) | placeholders
    target = "de" if family == "bitext" else None
    return Request(row=4, family=family, language=language, target=target, task="Do it.", placeholders=drawn, prompt="p", seed=1)


def reading(family: str, value: Any, *, language: str = "en", strict: bool = False, check_language: bool = True, **placeholders: str) -> Example | Problem:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return read(request(family, language, **placeholders), Answer(text=text), strict=strict, check_language=check_language)


@pytest.mark.parametrize("family", EXAMPLES)
def test_a_good_answer_becomes_an_example(family: str) -> None:
    values = [text.strip() for text in EXAMPLES[family].values()]
    expected = Example(row=4, instruction="Do it.", query=values[0], positive=values[1], negative=values[2] if len(values) == 3 else None)
    assert reading(family, EXAMPLES[family], strict=True) == expected


def test_keys_may_stand_in_any_order_and_a_fence_around_them() -> None:
    found = reading("sts", f"```json\n{json.dumps(dict(reversed(STS.items())), indent=1)}\n```\n")
    assert isinstance(found, Example)
    assert (found.query, found.positive, found.negative, found.notes) == (STS["S1"], STS["S2"], STS["S3"], ("fence",))


@pytest.mark.parametrize(
    ("family", "value", "reason", "detail"),
    [
        ("sts", "Sure! " + json.dumps(STS), "not_json", "near"),
        ("sts", json.dumps(STS) + " Hope this helps.", "not_json", "Extra data"),
        ("sts", json.dumps(STS)[:-5], "not_json", "near"),
        ("sts", str(STS), "not_json", "double quotes"),
        ("sts", "", "not_json", "Expecting value"),
        ("sts", '{"S1": "a", "S2": "b", "S3": "c", "S1": "d"}', "not_json", "'S1' stands twice"),
        ("sts", '{"S1": NaN, "S2": "b", "S3": "c"}', "not_json", "NaN is no JSON"),
        ("sts", '{"S1": ' + "9" * 5000 + "}", "not_json", "digits"),
        ("sts", [STS], "wrong_keys", "a JSON list and no object with S1, S2, S3"),
        ("sts", STS | {"score": "4"}, "wrong_keys", "with 'score'"),
        ("bitext", {"S1": "Guten Tag", "S2": "Hello"}, "wrong_keys", "without 'S3'"),
        ("short-long", {"query": "a", "positive_document": "b"}, "wrong_keys", "without 'user_query', 'hard_negative_document' and with 'query'"),
        ("short-short", SHORT | {"input": 7}, "not_text", "input is 7"),
        ("short-short", SHORT | {"input": None}, "not_text", "input is None"),
        ("short-short", '{"input": "\\ud83d", "positive_document": "x"}', "not_text", "ud83d"),
        ("long-long", LONG | {"positive_document": " \n"}, "empty", "positive_document is empty"),
        ("long-short", LONG_SHORT | {"label": "slow  Delivery", "misleading_label": "Slow delivery"}, "same_texts", "label and misleading_label"),
        ("short-short", SHORT | {"positive_document": "a STITCH in time"}, "same_texts", "input and positive_document"),
        ("sts", STS | {"S3": STS["S1"]}, "same_texts", "S1 and S3"),
        ("long-short", LONG_SHORT | {"label": "Late delivery"}, "label_in_input", "'late' of label"),
        ("long-short", LONG_SHORT | {"misleading_label": "lost parcel"}, "label_in_input", "'parcel' of misleading_label"),
        ("long-short", LONG_SHORT | {"input_text": "I am in. It is on me.", "label": "on me"}, "label_in_input", "'on me' of label"),
        ("long-short", LONG_SHORT | {"input_text": "An F, again!", "label": "F"}, "label_in_input", "'f' of label"),
    ],
)
def test_a_bad_answer_is_rejected_with_its_reason(family: str, value: Any, reason: Reason, detail: str) -> None:
    found = reading(family, value)
    assert isinstance(found, Problem)
    assert found.reason == reason
    assert detail in found.detail
    found.detail.encode()


@pytest.mark.parametrize(
    "label",
    [
        {"label": "about the delivery", "input_text": "It is about two weeks late."},  # No telling word is shared.
        {"label": "art", "input_text": "The party was great."},  # Not as a whole word.
        {"label": "not on time", "input_text": "It came on a day that was not mine."},  # Its short words alone.
    ],
)
def test_labels_may_share_what_says_nothing(label: dict[str, str]) -> None:
    assert isinstance(reading("long-short", LONG_SHORT | label), Example)


def test_labels_are_found_in_scripts_with_combining_marks() -> None:
    value = {"input_text": "यह शिकायत बहुत पुरानी है", "label": "शिकायत", "misleading_label": "प्रशंसा"}
    found = reading("long-short", value, language="hi")
    assert isinstance(found, Problem)
    assert found.reason == "label_in_input"


def test_each_text_must_be_in_its_language() -> None:
    swapped = {"S1": BITEXT["S2"], "S2": BITEXT["S1"], "S3": BITEXT["S3"]}
    german = {key: BITEXT["S2"] + f" {key}" for key in BITEXT}
    half = BITEXT | {"S3": "The train to Hamburg leaves at eight in the evening."}
    for value, key in ((swapped, "S1 is not English"), (german, "S1 is not English"), (half, "S3 is not German")):
        found = reading("bitext", value)
        assert isinstance(found, Problem)
        assert found.reason == "language"
        assert key in found.detail
        assert isinstance(reading("bitext", value, check_language=False), Example)
    assert reading("sts", STS, language="ja") == Problem("language", f"S1 is not Japanese: {STS['S1']!r}")


@pytest.mark.parametrize(
    ("family", "value", "placeholders", "notes", "detail"),
    [
        ("short-long", SHORT_LONG, {"query_length": "less than 5 words"}, ("query_length",), "user_query has 7 words, asked for were at most 4 words"),
        ("short-long", SHORT_LONG, {"num_words": "60"}, ("num_words",), "positive_document has 55 words, asked for were at least 60 words"),
        ("long-short", LONG_SHORT, {"num_words": "at least 10"}, ("num_words",), "input_text has 9 words, asked for were at least 10 words"),
        ("long-long", LONG | {"input": "Too short."}, {}, ("num_words",), "input has 2 words, asked for were at least 300 words"),
    ],
)
def test_a_length_rule_that_is_broken_is_a_note_or_a_reject(
    family: str, value: dict[str, str], placeholders: dict[str, str], notes: tuple[str, ...], detail: str
) -> None:
    found = reading(family, value, **placeholders)
    assert isinstance(found, Example)
    assert found.notes == notes
    assert reading(family, value, strict=True, **placeholders) == Problem("length", detail)


def test_lengths_in_a_language_without_blanks() -> None:
    value = {"input_text": "这个包裹晚到了两个星期，而且没有人回复我。", "label": "投诉", "misleading_label": "表扬"}  # 21 characters, 13.1 words.
    assert isinstance(reading("long-short", value, language="zh", strict=True, num_words="at least 10"), Example)
    found = reading("long-short", value, language="zh", strict=True, num_words="less than 10")
    assert found == Problem("length", "input_text has 13.1 words, asked for were at most 9 words")


def test_no_answer_and_one_that_was_cut() -> None:
    assert read(request("sts"), Answer(problem="HTTP 400: content filter")) == Problem("refused", "HTTP 400: content filter")
    assert read(request("sts"), Answer(text=json.dumps(STS), cut=True)).reason == "cut"  # type: ignore[union-attr]
