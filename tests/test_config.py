"""Settings: what is refused and in which words, files and overrides, and what may be printed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray import config
from llmemb_ray.config import EmbedSettings, FinetuneSettings, ModelSettings, SearchSettings, StorageSettings, VerifySettings, parse_actors
from llmemb_ray.errors import ConfigError
from llmemb_ray.representation.representation import Form, Representation
from llmemb_ray.written import command_line, masked, override, read_file


def settings(**values: Any) -> EmbedSettings:
    return EmbedSettings.make({"input": ["in"], "output": "out", "model": "m"} | values)


@pytest.mark.parametrize(("text", "bounds"), [("auto", None), ("0", (0, 0)), ("1", (1, 1)), ("8", (8, 8)), ("1:8", (1, 8)), ("3:3", (3, 3))])
def test_actors(text: str, bounds: tuple[int, int] | None) -> None:
    assert parse_actors(text) == bounds


@pytest.mark.parametrize("text", ["", "many", "-1", "3:2", "0:4", "1:2:3", "1.5", ":"])
def test_actors_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="actors"):
        settings(actors=text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"poling": "mean"}, ["poling: there is no such setting"]),
        ({"pooling": "max"}, ["pooling", "last", "mean", "weighted-mean"]),
        ({"limit_rows": 0, "max_reject_rate": 2}, ["limit_rows", "max_reject_rate"]),
        ({"rows_per_unit": -5}, ["rows_per_unit"]),
        ({"input": []}, ["input"]),
        ({"max_tokens": "many"}, ["max_tokens"]),
        ({"storage_retry_seconds": 0}, ["storage_retry_seconds"]),
    ],
)
def test_each_bad_setting_is_named(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        settings(**values)
    assert all(word in str(raised.value) for word in words)


def test_settings_that_are_missing_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"model: must be given.*input: must be given.*output: must be given"):
        EmbedSettings.make({})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings().model = "other"  # type: ignore[misc]


@pytest.mark.parametrize("model", [StorageSettings, ModelSettings, EmbedSettings, SearchSettings, VerifySettings])
def test_every_setting_has_help_text_and_a_place(model: type[config.Settings]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "…")), f"{name}: {field.description}"
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["panel"], name


# -- files and overrides -----------------------------------------------------------------------------


def test_a_file_may_write_names_with_dashes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rows-per-unit: 3\nstorage_options: {client-kwargs: {a-b: 1}}\n")
    assert read_file(str(tmp_path / "a.yaml")) == {"rows_per_unit": 3, "storage_options": {"client-kwargs": {"a-b": 1}}}
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_file(str(tmp_path / "empty.yaml")) == {}


@pytest.mark.parametrize(
    ("content", "words"), [("- a\n- b\n", "no mapping"), ("storage_options:\n  secret: hunter2\n  x: [\n", "line"), (b"\xff\xfe\x00", "not YAML")]
)
def test_a_bad_file_is_named_and_not_quoted(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words) as raised:
        read_file(str(path))
    assert "bad.yaml" in str(raised.value)
    assert "hunter2" not in str(raised.value)
    assert raised.value.__cause__ is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        read_file(str(tmp_path / "none.yaml"))


def test_overrides_reach_into_mappings_and_read_yaml() -> None:
    values = override(
        {"storage_options": {"key": "a"}, "layer": 1}, ["storage-options.client_kwargs.timeout=3", "layer=-2", "demo=['a=>B']", "filter=x = 3", "adapter=null"]
    )
    assert values == {"storage_options": {"key": "a", "client_kwargs": {"timeout": 3}}, "layer": -2, "demo": ["a=>B"], "filter": "x = 3", "adapter": None}


@pytest.mark.parametrize("assignment", ["layer", "=3", "layer.deep=3", "layer=[1"])
def test_an_override_that_cannot_be_read_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="set"):
        override({"layer": 1}, [assignment])


# -- secrets -----------------------------------------------------------------------------------------


def test_what_looks_like_a_secret_is_hidden_and_nothing_else() -> None:
    options = {
        "key": "AKIA",
        "secret": "hunter2",
        "password": 1234,
        "token": ["t1", "t2"],
        "connection_string": "AccountKey=abc",
        "client_kwargs": {"aws_session_token": "s3ss", "region_name": "eu-west-1", "headers": {"Authorization": "Bearer b34r"}},
        "anon": False,
        "credentials": {"deep": "d33p"},
        "profile": None,
    }
    values = settings(
        storage_options=options, endpoint_url="https://u:p4ss@store.example/?sig=s1g", max_tokens=64, token_budget=128, id_column="key"
    ).model_dump(mode="json")
    shown = masked(values)
    text = str(shown)
    for secret in ("AKIA", "hunter2", "1234", "t1", "abc", "s3ss", "b34r", "d33p", "p4ss", "s1g"):
        assert secret not in text, secret
    assert shown["storage_options"]["client_kwargs"]["region_name"] == "eu-west-1"
    assert (shown["max_tokens"], shown["token_budget"], shown["id_column"], shown["endpoint_url"]) == (64, 128, "key", "https://store.example/")
    assert values["storage_options"]["secret"] == "hunter2", "the settings themselves stay as they are"


def test_what_is_recorded_holds_neither_storage_options_nor_credentials() -> None:
    secret = "s3cr3t"
    url = f"https://user:{secret}@host/path?sig={secret}"
    recorded = settings(input=[url], output=url, model=url, adapter=url, endpoint_url=url, ray_address=url, storage_options={"key": secret}).recorded()
    assert secret not in str(recorded)
    assert recorded["input"] == ["https://host/path"]
    assert "storage_options" not in recorded


SIGNED = "https://user:s3cr3t@host/b.jsonl?X-Amz-Signature=s3cr3t"


def finetuning(*train: Any) -> FinetuneSettings:
    return FinetuneSettings.make({"model": "m", "out": "o", "train": list(train)})


def test_credentials_are_hidden_in_mappings_of_lists_too() -> None:
    made = finetuning("a.jsonl", {"path": ["c.jsonl", SIGNED], "weight": 0.5})
    shown = masked(made.model_dump(mode="json"))
    assert [source["path"] for source in shown["train"]] == [["a.jsonl"], ["c.jsonl", "https://host/b.jsonl"]]
    assert "s3cr3t" not in str(shown) + command_line(made, "finetune") + command_line(finetuning(SIGNED), "finetune")


def test_a_command_line_says_sources_that_are_more_than_a_path() -> None:
    assert command_line(finetuning("a.jsonl", {"path": "b c.jsonl"}), "finetune") == "llmemb finetune --model m --train a.jsonl --train 'b c.jsonl' --out o"
    sources = [
        "a.jsonl",
        {"path": ["s3://b/*.jsonl", "1:8"], "weight": 1e-5, "symmetric": True, "name": "no"},
        {"path": "c", "instruction": ["Who? a=b, 'c' 😀\n\x7f: {d}", "#e"]},
    ]
    for made in (finetuning(*sources), finetuning({"path": ["a", "b"]})):
        words = shlex.split(command_line(made, "finetune"))
        assert "--train" not in words
        again = override({"model": "m", "out": "o"}, [words[words.index("--set") + 1]])
        assert FinetuneSettings.make(again) == made
        assert again["train"] == [source.model_dump(exclude_unset=True) for source in made.train], "what was not given stays so"


# -- the representation ------------------------------------------------------------------------------


BASE = Representation(
    document=Form(template="doc {text}", clean="senteval"),
    query=Form(template="query {text}"),
    append_eos=True,
    pooling="mean",
    layer=-3,
    dimensions=16,
    max_tokens=77,
    normalize=False,
)


def built(tmp_path: Path, **values: Any) -> Representation:
    return ModelSettings.make({"model": "m", "representation": str(BASE.save(tmp_path))} | values).build_representation()


def test_a_representation_file_alone_is_taken_as_it_is(tmp_path: Path) -> None:
    assert built(tmp_path) == BASE
    assert ModelSettings.make({"model": "m", "representation": str(tmp_path)}).build_representation() == BASE, "by its directory"


@pytest.mark.parametrize("change", [{"pooling": "last"}, {"layer": -1}, {"normalize": True}, {"dimensions": None}, {"max_tokens": 9}, {"append_eos": False}])
def test_an_option_beside_a_representation_file_wins_even_with_its_default_value(tmp_path: Path, change: dict[str, Any]) -> None:
    found, (name, value) = built(tmp_path, **change), next(iter(change.items()))
    assert getattr(found, name) == value
    assert {**found.to_dict(), name: None} == {**BASE.to_dict(), name: None}, "and nothing else changes"


def test_a_prompt_beside_a_representation_file_replaces_its_forms_and_keeps_the_rest(tmp_path: Path) -> None:
    found = built(tmp_path, prompt="say {text}")
    assert found.document == found.query == Form(template="say {text}")
    assert (found.pooling, found.layer, found.max_tokens) == ("mean", -3, 77)
    assert found.append_eos is False, "that of the prompt"


@pytest.mark.parametrize(
    ("values", "ends"),
    [({}, False), ({"prompt": "e5"}, True), ({"prompt": "none"}, False), ({"prompt": "e5", "append_eos": False}, False), ({"append_eos": True}, True)],
)
def test_prompts_end_with_eos_by_default_only_for_e5(values: dict[str, Any], ends: bool) -> None:
    assert ModelSettings.make({"model": "m"} | values).build_representation().append_eos is ends


def test_a_demonstration_beside_the_wrong_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompteol-icl"):
        ModelSettings.make({"model": "m", "demo": ["a=>B"]}).build_representation()
