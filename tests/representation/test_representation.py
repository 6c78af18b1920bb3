"""The representation: what it accepts, and that its file gives back the same object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmemb_ray.errors import ConfigError
from llmemb_ray.representation import Demonstration, Form, Representation, preset

FULL = Representation(
    document=Form(template='„{text}“ {{"}}', clean="senteval"),
    query=Form(template="Instruct: naïve 数\nQuery: {text}"),
    append_eos=True,
    max_tokens=77,
    pooling="weighted-mean",
    layer=-3,
    normalize=False,
    dimensions=5,
)
ICL = Representation(document=preset("prompteol-icl", demonstrations=(Demonstration("a", "b"),))[0])


@pytest.mark.parametrize("representation", [Representation(), FULL, ICL])
def test_saved_and_loaded_it_is_the_same(representation: Representation, tmp_path: Path) -> None:
    path = representation.save(tmp_path)
    assert path.name == "llmemb.json"
    assert Representation.load(path) == representation
    assert Representation.load(tmp_path) == representation


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"pooling": "max"}, "last, mean, weighted-mean"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"dimensions": 0}, "dimensions"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Representation(**values)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ('{"poolin": "last"}', "poolin"),
        ('{"document": {"templat": "{text}"}}', "templat"),
        ('{"document": {"template": "no slot"}}', "stands there 0 times"),
        ('{"document": "{text}"}', "llmemb.json"),
    ],
)
def test_a_bad_file_is_refused_by_name(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "llmemb.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        Representation.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        Representation.load(tmp_path / "nowhere.json")


@given(st.text(), st.text())
def test_any_literal_text_survives_the_file_format(before: str, after: str) -> None:
    from llmemb_ray.representation.templates import literal

    representation = Representation(document=Form(template=literal(before) + "{text}" + literal(after)))
    assert Representation.from_dict(json.loads(json.dumps(representation.to_dict()))) == representation


def test_each_role_has_its_form() -> None:
    assert FULL.form("query") is FULL.query
    assert FULL.form("document") is FULL.document
