"""The space changes with everything that decides a vector, and with nothing else."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest

from llmemb_ray.representation import Form, Representation, Space
from llmemb_ray.representation.space import differences, digest

SPACE = Space(representation=Representation(max_tokens=64), model="sha256:1", adapter=None, tokenizer="t")

OTHER_VALUES: dict[str, Any] = {
    "document": Form(template='"{text}"'),
    "query": Form(clean="senteval"),
    "append_eos": True,
    "max_tokens": 65,
    "pooling": "mean",
    "layer": -2,
    "normalize": False,
    "dimensions": 3,
}


@pytest.mark.parametrize("name", [f.name for f in fields(Representation)])
def test_every_field_of_the_representation_decides_the_space(name: str) -> None:
    other = replace(SPACE, representation=replace(SPACE.representation, **{name: OTHER_VALUES[name]}))
    assert other.digest != SPACE.digest
    assert [path.split(".")[:2] for path, _, _ in differences(SPACE.to_dict(), other.to_dict())] == [["representation", name]]


@pytest.mark.parametrize("change", [{"model": "sha256:2"}, {"adapter": "sha256:1"}, {"tokenizer": "u"}])
def test_model_adapter_and_tokenizer_decide_the_space(change: dict[str, str]) -> None:
    assert replace(SPACE, **change).digest != SPACE.digest


def test_the_digest_is_the_same_in_another_process() -> None:
    code = (
        "from llmemb_ray.representation import *\n"
        "print(Space(tokenizer='t', adapter=None, model='sha256:1', representation=Representation(max_tokens=64)).digest)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip() == SPACE.digest


def test_key_order_does_not_matter_but_values_and_types_do() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len({digest(value) for value in (1, "1", True, [1], {"1": None}, None, "")}) == 7


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", math.nan])
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        digest(value)


def test_differences_are_named_by_dotted_paths() -> None:
    ours, theirs = {"a": {"b": 1, "c": [1]}, "d": 0}, {"a": {"b": 2, "c": [1]}, "e": 0}
    assert list(differences(ours, theirs)) == [("a.b", 1, 2), ("d", 0, None), ("e", None, 0)]
    assert not list(differences(ours, ours))
