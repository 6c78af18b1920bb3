"""The six families as paper 2 describes them."""

from __future__ import annotations

import jsonschema
import pytest

from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES, WEIGHTS, schema, words

DRAWN = {"query_type": "common", "query_length": "5 to 15 words", "clarity": "clear", "num_words": "100", "difficulty": "college"}


def test_keys_and_what_becomes_of_them() -> None:
    assert {name: (*family.keys, family.query, family.positive, family.negative) for name, family in FAMILIES.items()} == {
        "short-long": ("user_query", "positive_document", "hard_negative_document", "user_query", "positive_document", "hard_negative_document"),
        "long-short": ("input_text", "label", "misleading_label", "input_text", "label", "misleading_label"),
        "sts": ("S1", "S2", "S3", "S1", "S2", "S3"),
        "bitext": ("S1", "S2", "S3", "S1", "S2", "S3"),
        "long-long": ("input", "positive_document", "input", "positive_document", None),
        "short-short": ("input", "positive_document", "input", "positive_document", None),
    }


def test_proportions_and_instructions() -> None:
    assert WEIGHTS == {"short-long": 167, "long-short": 122, "sts": 99, "bitext": 89, "long-long": 17, "short-short": 13}
    assert sum(WEIGHTS.values()) == 507
    assert ASYMMETRIC == ("short-long", "long-short", "long-long", "short-short")
    assert (FAMILIES["sts"].instruction, FAMILIES["bitext"].instruction) == ("Retrieve semantically similar text.", "Retrieve parallel sentences.")


@pytest.mark.parametrize(
    ("family", "key", "drawn", "bounds"),
    [
        ("short-long", "user_query", {"query_length": "less than 5 words"}, (None, 4)),
        ("short-long", "user_query", {"query_length": "5 to 15 words"}, (5, 15)),
        ("short-long", "user_query", {"query_length": "at least 10 words"}, (10, None)),
        ("short-long", "hard_negative_document", {"num_words": "300"}, (300, None)),
        ("long-short", "input_text", {"num_words": "less than 10"}, (None, 9)),
        ("long-short", "input_text", {"num_words": "at least 200"}, (200, None)),
        ("long-long", "input", {}, (300, None)),
    ],
)
def test_words_asked_for(family: str, key: str, drawn: dict[str, str], bounds: tuple[int | None, int | None]) -> None:
    found = words(FAMILIES[family], key, DRAWN | drawn)
    assert found is not None
    assert (found.least, found.most) == bounds


@pytest.mark.parametrize(("family", "key"), [("long-short", "label"), ("sts", "S1"), ("bitext", "S3"), ("short-short", "input")])
def test_texts_without_a_number_of_words(family: str, key: str) -> None:
    assert words(FAMILIES[family], key, {"num_words": "at least 50", "unit": "phrase"}) is None


def test_a_schema_takes_what_was_asked_for_and_nothing_else() -> None:
    made = schema(FAMILIES["short-long"], 100_000, DRAWN)
    long = "unquestionably " * 100  # The 100 words asked for, each longer than those of most languages.
    good = {"user_query": "why do cats purr", "positive_document": long, "hard_negative_document": long}
    jsonschema.validate(good, made)
    for bad in (
        good | {"score": "1"},
        {key: value for key, value in good.items() if key != "user_query"},
        good | {"user_query": ""},
        good | {"user_query": 3},
        good | {"positive_document": long * 4},
        good | {"user_query": "x" * 481},  # 15 words of 16 characters, twice.
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, made)


def test_limits_of_a_schema_follow_what_was_drawn_up_to_the_one_given() -> None:
    def limits(family: str, max_length: int, **drawn: str) -> list[int]:
        return [value["maxLength"] for value in schema(FAMILIES[family], max_length, DRAWN | drawn)["properties"].values()]

    assert limits("short-long", 10**6, query_length="less than 5 words", num_words="500") == [4 * 2 * 16, 16_000, 16_000]
    assert limits("short-long", 200, query_length="less than 5 words", num_words="500") == [128, 200, 200]
    assert limits("long-long", 10**6) == [9600, 9600]
    assert limits("long-short", 10**6, num_words="less than 10") == [9 * 2 * 16, 240, 240]
    assert limits("sts", 10**6, unit="phrase") < limits("sts", 10**6, unit="sentence") < limits("sts", 10**6, unit="passage")
    assert limits("short-short", 50) == [50, 50]
