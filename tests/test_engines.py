"""Which engine runs a model, what each refuses, and that the documentation knows every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmemb_ray import engines
from llmemb_ray.config import EmbedSettings, ModelSettings
from llmemb_ray.embedders import settle
from llmemb_ray.errors import ConfigError
from llmemb_ray.written import read_file
from tests.small_models import make_model

ROOT = Path(__file__).parents[1]


def made(**settings: Any) -> ModelSettings:
    return ModelSettings.make({"model": "facebook/opt-125m", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "vllm", "pooling": "weighted-mean"}, "pooling: vLLM has no weighted-mean; set backend hf"),
        ({"backend": "vllm", "layer": -2}, "layer: vLLM gives the last layer's states only.*backend hf"),
        ({"backend": "vllm", "quantization": "nf4"}, "nf4 is a format of backend hf; vllm has .*fp8_per_tensor.*awq"),
        ({"backend": "hf", "quantization": "fp8_per_tensor"}, "fp8_per_tensor is a format of backend vllm; hf has nf4, llm.int8"),
        ({"backend": "hf", "tensor_parallel": 2}, "tensor_parallel: .*gpus_per_actor"),
        ({"backend": "hf", "engine_arg": ["max_num_seqs=8"]}, "engine_arg: is for vLLM"),
        ({"quantization": "nf4", "tensor_parallel": 2}, "nf4 is a format of backend hf"),
        ({"engine_arg": ["dtype=float16"]}, "engine_arg: dtype is settled by llmemb; set compute_dtype instead"),
        ({"engine_arg": ["hf_overrides={a: 1}"]}, "hf_overrides is settled by llmemb; leave it out"),
        ({"backend": "vllm", "pooling": "mean", "engine_arg": ["enable_prefix_caching=true"]}, "enable_prefix_caching goes with pooling last only"),
        ({"engine_arg": ["pipeline_parallel_size=2"]}, "pipeline_parallel_size is settled by llmemb; set tensor_parallel instead"),
        ({"engine_arg": ["max_num_seqs"]}, "'max_num_seqs' is not KEY=VALUE"),
        ({"engine_arg": ["max_num_seqs=[1"]}, "the value of max_num_seqs is not YAML"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_when_the_configuration_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**settings)


def test_arguments_of_the_engine_are_yaml() -> None:
    arguments = made(engine_arg=["max_num_seqs=8", "enforce_eager=true", "compilation_config={mode: 0}"]).engine_args
    assert arguments == {"max_num_seqs": 8, "enforce_eager": True, "compilation_config": {"mode": 0}}


def choose(monkeypatch: pytest.MonkeyPatch, version: str | None, **changes: Any) -> engines.Choice:
    monkeypatch.setattr(engines, "vllm_version", lambda: version)
    model: dict[str, Any] = {"model_type": "llama", "head_size": 64, "heads": 12, "stored": None, "lora_problem": None, "beyond_rope_switch": False}
    settings: dict[str, Any] = {"gpu": True, "pooling": "last", "layer": -1, "quantization": "none", "tensor_parallel": 1, "engine_args": {}}
    facts = engines.ModelFacts(**(model | {name: value for name, value in changes.items() if name in model}))
    return engines.choose(model=facts, **(settings | {name: value for name, value in changes.items() if name not in model}))


@pytest.mark.parametrize(
    ("version", "changes", "backend", "why"),
    [
        ("0.32.0", {}, "vllm", "vLLM 0.32.0 is installed"),
        ("0.32.0+cpu", {"gpu": False}, "vllm", "vLLM 0.32.0"),
        (None, {}, "hf", "not installed"),
        ("0.33.0", {}, "hf", "untested"),
        ("0.32.0", {"gpu": False}, "hf", "built for GPUs"),
        ("0.32.0+cpu", {}, "hf", "built for the CPU"),
        ("0.32.0+cpu", {"gpu": False, "head_size": 16}, "hf", "heads of 16"),
        ("0.32.0", {"head_size": 16}, "vllm", ""),
        ("0.32.0", {"model_type": "bloom"}, "hf", "bloom"),
        ("0.32.0", {"pooling": "weighted-mean"}, "hf", "weighted-mean"),
        ("0.32.0", {"layer": 3}, "hf", "layer 3"),
        ("0.32.0", {"quantization": "nf4"}, "hf", "nf4"),
        ("0.32.0", {"stored": "bitsandbytes"}, "hf", "bitsandbytes"),
        ("0.32.0", {"lora_problem": "it is a DoRA adapter"}, "hf", "DoRA"),
        ("0.32.0", {"beyond_rope_switch": True}, "hf", "LongRoPE"),
        (None, {"tensor_parallel": 8}, "vllm", "only vLLM can do it: tensor_parallel"),
        (None, {"quantization": "awq"}, "vllm", "only vLLM"),
    ],
)
def test_auto_takes_vllm_where_it_can_and_says_why(
    version: str | None, changes: dict[str, Any], backend: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(monkeypatch, version, **changes)
    assert choice.backend == backend
    assert why in choice.why


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        (None, "awq", "this one is not quantised; formats:\n.*fp8_per_tensor"),
        ("gptq", "awq", "this one is stored as gptq"),
        ("awq", "fp8_per_tensor", "stored as awq already; leave fp8_per_tensor out"),
        (None, "fp8", "this one is not quantised"),
    ],
)
def test_a_format_of_the_checkpoint_is_checked_against_it(stored: str | None, asked: str, message: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    if stored:
        config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": stored, "bits": 4}}
        (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        settle(ModelSettings.make({"model": str(model), "quantization": asked}))


def test_a_stored_format_may_be_named_or_left_out(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (model / "config.json").write_text(json.dumps(config))
    for asked in ("awq", "none"):
        assert settle(ModelSettings.make({"model": str(model), "quantization": asked})).stored == "awq"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3 adapter"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["embed_tokens"]}, "whole modules .embed_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model's weights"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank is 1024"),
    ],
    ids=str,
)
def test_an_adapter_that_vllm_cannot_serve_is_refused_by_what_it_is(changes: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, "bias": "none"} | changes
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"vLLM cannot serve the adapter: .*{message}.*set backend hf"):
        settle(ModelSettings.make({"model": str(model), "backend": "vllm", "adapter": str(tmp_path / "adapter")}))


def test_prompts_beyond_the_switch_of_longrope_are_not_for_vllm(tmp_path: Path) -> None:
    angles = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}
    phi = make_model(tmp_path / "phi", "phi3", rope_parameters=angles, original_max_position_embeddings=64)
    within = settle(ModelSettings.make({"model": str(phi), "backend": "vllm", "max_tokens": 64}))
    assert within.rope_switch == 64
    with pytest.raises(ConfigError, match=r"LongRoPE.*lower max_tokens.*set backend hf"):
        settle(ModelSettings.make({"model": str(phi), "backend": "vllm", "max_tokens": 65}))


def test_heads_must_be_shared_evenly(model: Path) -> None:
    with pytest.raises(ConfigError, match="4 attention heads cannot be split over 3 GPUs"):
        settle(ModelSettings.make({"model": str(model), "backend": "vllm", "tensor_parallel": 3}))


def test_a_model_of_text_and_images_is_not_taken_for_its_text_decoder(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert settle(ModelSettings.make({"model": str(tmp_path / "copy")})).model_type == "llama"
    from transformers import Gemma3Config, Gemma3TextConfig

    text = Gemma3TextConfig(vocab_size=len(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]) + 8, hidden_size=32, num_hidden_layers=2)
    Gemma3Config(text_config=text).save_pretrained(tmp_path / "copy")
    spec = settle(ModelSettings.make({"model": str(tmp_path / "copy")}))
    assert spec.model_type == "gemma3"
    assert spec.model_type not in engines.VLLM_COMPARED


def test_gpus_that_vllm_would_leave_idle_are_refused_or_left_to_transformers(model: Path, corpus: Path, tmp_path: Path) -> None:
    places = {"input": [str(corpus)], "output": str(tmp_path / "out"), "model": str(model), "gpus_per_actor": 4}
    with pytest.raises(ConfigError, match="gpus_per_actor: vLLM would use 1 of 4 GPUs; set tensor_parallel"):
        EmbedSettings.make(places | {"backend": "vllm"})
    spec = settle(EmbedSettings.make(places))
    assert (spec.backend, "spreads whole layers" in spec.backend_why) == ("hf", True)


def test_without_vllm_the_way_to_it_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmemb_ray.embedders import Embedder

    monkeypatch.setattr(engines, "vllm_version", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'llmemb-ray\[vllm\]'.*or set backend hf"):
        Embedder.load(str(model), backend="vllm")


def test_the_documentation_knows_every_format_and_architecture() -> None:
    page = (ROOT / "docs" / "backends.md").read_text()
    assert [name for name in [*engines.WEIGHT_FORMATS, *engines.VLLM_COMPARED] if name not in page] == []


def test_the_configurations_in_jobs_are_accepted() -> None:
    files = sorted((ROOT / "jobs").glob("*.yaml"))
    assert files
    for file in files:
        settings = EmbedSettings.make({"input": ["s3://b/in"], "output": "s3://b/out"} | read_file(str(file)))
        settings.build_representation()
