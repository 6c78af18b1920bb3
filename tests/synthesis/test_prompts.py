"""The wording of requests, the package's and a user's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llmemb_ray.errors import ConfigError
from llmemb_ray.storage import Access
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES
from llmemb_ray.synthesis.prompts import Prompts, wanted


def load(directory: Path, content: object) -> Prompts:
    file = directory / "own.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return Prompts.load(str(file), Access())


def test_the_package_has_all_entries_and_says_every_value_and_key() -> None:
    prompts = Prompts.load()
    assert (set(prompts.brainstorm), set(prompts.generate)) == (set(ASYMMETRIC), set(FAMILIES))
    for family in FAMILIES.values():
        values = {name: f"<{name}>" for name in wanted(family)}
        text = prompts.render(family, values)
        assert all(value in text for value in values.values())
        assert all(text.count(f'"{key}"') == 2 for key in family.keys)
        assert re.search(r"\{[a-z_]+\}", text) is None
        assert "JSON object and with nothing else" in text


def test_placeholders_of_families() -> None:
    assert wanted(FAMILIES["short-long"]) == ("task", "query_type", "query_length", "clarity", "num_words", "difficulty", "language")
    assert wanted(FAMILIES["bitext"]) == ("unit", "high_score", "low_score", "difficulty", "src_lang", "tgt_lang")


def test_a_file_replaces_single_entries(tmp_path: Path) -> None:
    own = Prompts.load()
    text = 'Do {task} in {language}: {"input": "...", "positive_document": "{}"}'
    prompts = load(tmp_path, {"generate": {"short-short": text}})
    rendered = prompts.render(FAMILIES["short-short"], {"task": "what {language} says", "language": "Dutch"})
    assert rendered == 'Do what {language} says in Dutch: {"input": "...", "positive_document": "{}"}'
    assert prompts.brainstorm == own.brainstorm
    assert {family for family in FAMILIES if prompts.generate[family] != own.generate[family]} == {"short-short"}
    assert prompts.digest != own.digest == Prompts.load().digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not YAML, line 1"),
        ("- a", "holds no mapping"),
        ({"generat": {}}, "unknown generat; there are brainstorm and generate"),
        ({"generate": "x"}, "generate is no mapping"),
        ({"brainstorm": {"sts": "x"}}, "brainstorm sts is not known; the families are short-long, long-short, long-long, short-short"),
        ({"brainstorm": {"short-long": "Twenty tasks in {language}"}}, r"brainstorm short-long: placeholder \{language\} is not known; it has no placeholders"),
        ({"generate": {"short-short": "{task} {language} {tone}"}}, r"generate short-short: placeholder \{tone\} is not known"),
        ({"generate": {"long-long": "{task}"}}, r"generate long-long: placeholder \{language\} is missing; it has \{task\}, \{language\}"),
        ({"generate": {"sts": "  "}}, "generate sts is no text"),
    ],
)
def test_what_cannot_work_is_refused_with_its_entry(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, content)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml is not there"):
        Prompts.load(str(tmp_path / "none.yaml"))
