"""The real vLLM: it answers as transformers does, follows schemas, and its death is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray.embedders import models
from llmemb_ray.errors import ConfigError, EngineDied
from llmemb_ray.generation.generator import Prompt
from llmemb_ray.generation.local import LocalGenerator, LocalSpec
from tests.generation.test_local import SCHEMA, bytewise_tokenizer
from tests.small_models import SENTENCES, make_model

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's CPU kernels begin at attention heads of 32 dimensions."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(tmp_path_factory.mktemp("wide"), tokenizer=bytewise_tokenizer(), head=True, **heads)


def generator(path: Path, **values: Any) -> Any:
    from llmemb_ray.generation.vllm_engine import VllmGenerator, VllmSpec

    return VllmGenerator(VllmSpec(source=models.resolve(str(path)), compute_dtype="float32", **values))


def test_greedy_answers_are_those_of_transformers(wide: Path) -> None:
    prompts = [*(Prompt(text=text) for text in SENTENCES), Prompt(text="x " * 300)]
    reference = LocalGenerator(LocalSpec(source=models.resolve(str(wide)), compute_dtype="float32", max_new_tokens=12))
    assert dict(generator(wide, max_new_tokens=12).generate(prompts)) == dict(reference.generate(prompts))


def test_sampled_answers_follow_their_schema_and_their_seed_until_the_engine_dies(wide: Path) -> None:
    made = generator(wide, temperature=1.0, max_new_tokens=40, structured="json_schema")
    prompts = [Prompt(text=text, schema=SCHEMA if number % 2 else None, seed=number) for number, text in enumerate(SENTENCES)]
    together = dict(made.generate(prompts))
    held = [json.loads(str(together[number].text)) for number in range(1, len(SENTENCES), 2)]
    assert all(set(one) == {"text", "label"} and 1 <= len(one["text"]) <= 12 and one["label"] in ("yes", "no") for one in held)
    assert dict(made.generate([prompts[3]]))[0] == together[3]
    left = made.generate(prompts)
    next(left)
    left.close()
    assert dict(made.generate(prompts)) == together
    with pytest.raises(ConfigError, match="structured: the JSON schema"):
        list(made.generate([Prompt(text="x", schema={"type": "sentence"})]))

    def broken() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    made._engine.raw.step = broken
    for _ in range(2):
        with pytest.raises(EngineDied, match="illegal memory access"):
            list(made.generate(prompts))
