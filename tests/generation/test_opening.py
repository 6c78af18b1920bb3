"""From settings to a generator: what is refused, which engine is chosen, and what a name holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray import engines
from llmemb_ray.config import DemosBuildSettings, GeneratorSettings
from llmemb_ray.errors import ConfigError
from llmemb_ray.generation.generator import Prompt
from llmemb_ray.generation.opening import load, name_of, opened, spec_of, specs_of
from tests.generation.chat_server import ChatServer
from tests.small_models import SENTENCES, make_model


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("causal"), head=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "llm or model, one of them"),
        ({"llm": "a", "model": "b"}, "llm or model, one of them"),
        ({"model": "b", "tokens_per_minute": 5}, "tokens_per_minute: for an endpoint; does nothing without llm"),
        ({"llm": "a", "engine": "vllm"}, "engine: for a model that is loaded; does nothing without model"),
        ({"model": "b", "temperature": None}, "temperature: null leaves it to an endpoint"),
        ({"llm": "a", "temperature": 0, "top_p": 0.5}, "top_p: does nothing at temperature 0"),
        ({"model": "b", "engine": "transformers", "engine_arg": ["max_num_seqs=4"]}, "engine_arg: for vLLM"),
        ({"model": "b", "engine_arg": ["dtype=half"]}, "engine_arg: dtype is settled by llmemb; set compute_dtype instead"),
        ({"model": "b", "engine_arg": ["fast"]}, "engine_arg: 'fast' is not KEY=VALUE"),
        ({"model": "b", "tensor_parallel": 2, "gpus_per_actor": 1}, "gpus_per_actor: tensor_parallel=2"),
    ],
)
def test_settings_that_do_nothing_or_contradict_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        GeneratorSettings.make(values)


def test_a_key_of_an_endpoint_holds_what_decides_an_answer_and_not_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    values = {"llm": "tiny", "base_url": "http://here:8000/v1"}
    key = name_of(GeneratorSettings.make(values))
    assert key == "tiny, temperature 1.0, at most 2048 tokens, json_schema"
    for same in ({"base_url": "http://there/v1"}, {"concurrency": 2}, {"requests_per_minute": 5}, {"structured": "json_schema"}):
        assert name_of(GeneratorSettings.make(values | same)) == key
    others = ({"llm": "b"}, {"temperature": 0.5}, {"temperature": None}, {"top_p": 0.5}, {"max_new_tokens": 9}, {"structured": "none"})
    keys = {name_of(GeneratorSettings.make(values | other)) for other in others}
    assert len(keys | {key}) == 1 + len(others)
    demos = DemosBuildSettings.make({"out": "x", "sentences": ["s.txt"], **values})
    with opened(demos) as generator:  # As answers were kept before there were other settings: they are found again.
        assert generator.name == "tiny at http://here:8000/v1, temperature 0.0, at most 24 tokens"


def test_the_engine_follows_from_what_is_installed_and_where_the_model_will_be(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(version: str | None, **values: Any) -> list[str]:
        monkeypatch.setattr(engines, "vllm_version", lambda: version)
        return [spec.engine for spec in specs_of(GeneratorSettings.make({"model": str(causal), **values})).values()]

    assert chosen("0.32.0") == ["vllm", "transformers"]  # On GPUs, on CPUs.
    assert chosen("0.32.0+cpu") == chosen(None) == ["transformers"] * 2
    assert chosen("0.32.0+cpu", engine="vllm") == ["vllm"] * 2
    assert chosen("0.32.0+cpu", engine_arg=["max_num_seqs=4"]) == ["vllm"] * 2
    assert chosen("0.32.0", engine="transformers") == ["transformers"] * 2
    names = [name_of(GeneratorSettings.make({"model": str(causal), "engine": engine}), "cpu") for engine in ("vllm", "transformers")]
    assert names[0].replace(", vllm", "") == names[1]


def test_a_spec_travels_to_another_process_and_gives_the_same_answers(causal: Path) -> None:
    settings = GeneratorSettings.make({"model": str(causal), "actors": 0, "max_new_tokens": 5})
    prompts = [Prompt(text=text, seed=7) for text in SENTENCES[:3]]
    with opened(settings) as generator:
        here = dict(generator.generate(prompts))
    there = load(pickle.loads(pickle.dumps(spec_of(settings))))
    assert dict(there.generate(prompts)) == here
    assert there.name == name_of(settings)


def test_settings_reach_the_endpoint() -> None:
    with ChatServer(lambda *_: "{}") as server:
        settings = GeneratorSettings.make({"llm": "tiny", "base_url": server.url, "top_p": 0.5, "max_new_tokens": 9, "structured": "json_object"})
        with opened(settings) as generator:
            list(generator.generate([Prompt(text="x", schema={"type": "object"}, seed=4)]))
    [(_, body)] = server.requests
    wanted = {"temperature": 1.0, "top_p": 0.5, "max_tokens": 9, "seed": 4, "response_format": {"type": "json_object"}}
    assert {name: body[name] for name in wanted} == wanted
