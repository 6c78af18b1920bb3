"""What vLLM's engine is told, on paper: for GPUs that are not here too. Needs no vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmemb_ray.config import ModelSettings
from llmemb_ray.embedders import EmbedderSpec, settle, vllm_engine
from llmemb_ray.errors import ModelError

SEVEN_BILLION = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
WEIGHTS = int(13.5e9)


@pytest.fixture
def spec(model: Path) -> EmbedderSpec:
    return settle(ModelSettings.make({"model": str(model), "backend": "vllm", "max_tokens": 256})).on(gpu=True)


def told(spec: EmbedderSpec, device: vllm_engine.Device = "gpu", *, prefix: int = 40, memory: float | None = 80e9, **changes: Any) -> dict[str, Any]:
    spec = replace(spec, **changes)
    return vllm_engine.arguments(spec, SEVEN_BILLION, device, prefix=prefix, memory=int(memory) if memory else None, weights=WEIGHTS)


def test_a_whole_gpu(spec: EmbedderSpec) -> None:
    chosen = told(spec)
    assert (chosen["dtype"], chosen["block_size"], chosen["enable_prefix_caching"]) == ("bfloat16", 16, True)
    assert (chosen["max_num_batched_tokens"], chosen["max_model_len"], chosen["tensor_parallel_size"]) == (16384, 256, 1)
    assert "enforce_eager" not in chosen
    per_token = 2 * 32 * 4096 * 2
    assert chosen["kv_cache_memory_bytes"] == per_token * (16384 + 512 * 16 + 256 + 40)
    assert chosen["gpu_memory_utilization"] < 0.05, "vLLM would refuse a GPU whose last user is still leaving"


@pytest.mark.parametrize(("memory", "share"), [(24e9, 1.0), (80e9, 0.25), (40e9, 0.5)])
def test_the_cache_leaves_room_for_weights_within_the_share_of_the_gpu(spec: EmbedderSpec, memory: float, share: float) -> None:
    chosen = told(spec, memory=memory, gpu_share=share)
    assert chosen["kv_cache_memory_bytes"] + WEIGHTS < memory * share
    assert chosen["kv_cache_memory_bytes"] >= 2 * 32 * 4096 * 2 * (256 + 40), "a prompt of full length fits"


def test_layers_split_over_gpus_share_the_cache(spec: EmbedderSpec) -> None:
    chosen = told(spec, tensor_parallel=8)
    assert chosen["distributed_executor_backend"] == "mp"
    assert chosen["kv_cache_memory_bytes"] == told(spec)["kv_cache_memory_bytes"] // 8


def test_blocks_are_left_to_vllm_where_nothing_is_cached(spec: EmbedderSpec) -> None:
    for chosen in (told(spec, prefix=15), told(spec, representation=replace(spec.representation, pooling="mean"))):
        assert not chosen["enable_prefix_caching"]
        assert "block_size" not in chosen


def test_a_mean_is_pooled_of_prompts_in_one_piece(spec: EmbedderSpec) -> None:
    representation = replace(spec.representation, pooling="mean", max_tokens=20_000)
    assert told(spec, representation=representation)["max_num_batched_tokens"] == 20_000


def test_a_cpu(spec: EmbedderSpec) -> None:
    chosen = told(spec, "cpu", memory=None, compute_dtype="auto")
    assert (chosen["dtype"], chosen["block_size"], chosen["enforce_eager"], chosen["max_num_batched_tokens"]) == ("float32", 32, True, 512)
    assert "gpu_memory_utilization" not in chosen


def test_what_the_user_says_wins(spec: EmbedderSpec) -> None:
    chosen = told(spec, engine_args={"kv_cache_memory_bytes": 7, "enforce_eager": True}, token_budget=4096, quantization="fp8_per_tensor")
    assert (chosen["kv_cache_memory_bytes"], chosen["enforce_eager"], chosen["max_num_batched_tokens"]) == (7, True, 4096)
    assert chosen["quantization"] == "fp8_per_tensor"


# -- the files that it sees ----------------------------------------------------------------------


def test_a_plain_model_is_seen_where_it_is(model: Path) -> None:
    assert vllm_engine.view(model, "commit", None) == model


def test_what_sentence_transformers_adds_is_not_seen_and_the_view_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "modules.json").write_text("[]")
    seen = vllm_engine.view(copy, "commit", None)
    assert {file.name for file in seen.iterdir()} == {file.name for file in model.iterdir()}
    assert vllm_engine.view(copy, "commit", None) == seen
    assert vllm_engine.view(copy, "another", None) != seen


def test_embeddings_stored_as_the_head_are_given_their_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    save_file({"lm_head.weight": torch.eye(3)}, model / "a.safetensors")
    save_file({"model.norm.weight": torch.ones(3)}, model / "b.safetensors")
    seen = vllm_engine.view(model, "commit", "model.embed_tokens.weight")
    index = json.loads((seen / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert torch.equal(load_file(seen / index["model.embed_tokens.weight"])["model.embed_tokens.weight"], torch.eye(3))


def test_embeddings_that_are_not_found_are_not_left_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    save_file({"embed_out.weight": torch.eye(3)}, tmp_path / "model" / "a.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.weight in safetensors\); set backend hf"):
        vllm_engine.view(tmp_path / "model", "commit", "embed_in.weight")
