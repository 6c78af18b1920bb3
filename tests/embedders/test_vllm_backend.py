"""The real vLLM gives transformers' own vectors, shares the prefix in whole blocks, and refuses rows one by one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from llmemb_ray import engines
from llmemb_ray.config import ModelSettings
from llmemb_ray.embedders import Embedder, EmbedderSpec, settle
from llmemb_ray.embedders.models import load_model
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation import TokenRows
from tests.embedders.inference import FP32_BOUND, RANDOM, Reference, assert_spread, embed, make_rows, reference_of
from tests.small_models import SENTENCES, config_of, make_adapter, make_model, with_wide_heads

pytestmark = pytest.mark.vllm

BF16_COSINE = 0.999

WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2}
"""vLLM's CPU kernels begin at attention heads of 32 dimensions."""

KINDS: dict[str, dict[str, Any]] = {
    "opt": WIDE | {"word_embed_proj_dim": 64},
    "opt-350m": WIDE,
    "llama": WIDE | {"num_key_value_heads": 1},
    "mistral": WIDE | {"num_key_value_heads": 1},
    "qwen2": WIDE | {"num_key_value_heads": 1},
    "qwen3": WIDE | {"num_key_value_heads": 1, "head_dim": 32},
    "gpt2": {"n_embd": 64, "n_head": 2},
    "gpt_neox": WIDE,
    "phi": WIDE,
    "phi3": WIDE | {"num_key_value_heads": 1},
    "gemma": WIDE | {"head_dim": 32},
    "gemma2": WIDE | {"head_dim": 32},
    "gemma3_text": WIDE | {"head_dim": 32},
}

PREFIX = RANDOM.integers(3, 300, 75).astype(np.int32)
"""Two blocks of 32 tokens, and 11 more."""

ROWS = [*make_rows(PREFIX), np.concatenate([PREFIX[:-1], PREFIX[:1], PREFIX[:40]]), np.concatenate([PREFIX[:31], PREFIX[40:50]])]
"""Also rows that share all of the prefix but one token, and all of its first block but one."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("architectures")
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            tiny = real_models / "TinyStories-656K"
            made[kind] = with_wide_heads(tiny, root / kind) if kind == tiny.name else make_model(root / kind, kind, **KINDS[kind])
        return made[kind]

    return of


def spec_of(model: Path, **settings: Any) -> EmbedderSpec:
    return settle(ModelSettings.make({"model": str(model), "backend": "vllm", **settings})).on(gpu=False)


def backend_of(model: Path, prefixes: list[Any] | None = None, **settings: Any) -> Any:
    from llmemb_ray.embedders.vllm_backend import VllmBackend

    return VllmBackend(spec_of(model, **settings), prefixes=[PREFIX] if prefixes is None else prefixes)


def reference(model: Path) -> Reference:
    return reference_of(load_model(model, device="cpu", compute_dtype="float32"))


def test_every_architecture_that_auto_takes_has_its_test() -> None:
    assert {config_of(kind).model_type for kind in KINDS} == engines.VLLM_COMPARED


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_one_by_one_inference(kind: str, directory: Callable[[str], Path]) -> None:
    expected = reference(directory(kind))(ROWS)
    assert_spread(expected)
    backend = backend_of(directory(kind))
    assert backend.shares_prefix
    assert (embed(backend, ROWS, PREFIX) - expected).abs().max() <= FP32_BOUND
    order = RANDOM.permutation(len(ROWS))
    assert (embed(backend, [ROWS[row] for row in order], PREFIX) - expected[torch.from_numpy(order)]).abs().max() <= FP32_BOUND
    single = torch.cat([embed(backend, [row], PREFIX) for row in ROWS[:5]])
    assert (single - expected[:5]).abs().max() <= FP32_BOUND


@pytest.mark.parametrize("kind", ["opt", "opt-350m", "llama", "mistral", "qwen3"])
def test_bfloat16_is_close(kind: str, directory: Callable[[str], Path]) -> None:
    expected = reference(directory(kind))(ROWS)
    vectors = embed(backend_of(directory(kind), compute_dtype="bfloat16"), ROWS, PREFIX)
    assert (vectors * expected).sum(1).min() >= BF16_COSINE


def test_the_real_tinystories_model(directory: Callable[[str], Path], real_models: Path) -> None:
    """Its heads have 16 dimensions, vLLM's kernels 32: the same weights with heads filled up with zeros are the same model."""
    texts = [text for text in SENTENCES if text.isascii()]
    plain = Embedder.load(str(real_models / "TinyStories-656K"), backend="hf")
    wide = Embedder.load(str(directory("TinyStories-656K")), backend="vllm")
    assert np.abs(wide.encode(texts) - plain.encode(texts)).max() <= FP32_BOUND


TEMPLATES: dict[str, dict[str, Any]] = {
    "prompteol": {"prompt": "prompteol"},
    "one demonstration": {"prompt": "prompteol-icl", "demo": ["A jockey riding a horse.=>Equestrian"]},
    "three demonstrations": {"prompt": "prompteol-icl", "demo": ["A jockey riding a horse.=>Equestrian", "It rains.=>Weather", "2 + 2 = 4=>Sum"]},
    "e5": {"prompt": "e5", "instruction": "Given a question, retrieve passages that answer it", "role": "query"},
    "none": {"prompt": "none"},
    "own": {"prompt": "Text: {text}\nIn short, this text says that"},
    "senteval": {"prompt": "prompteol", "clean": "senteval"},
    "cut": {"prompt": "prompteol", "max_tokens": 32},
    "few dimensions, not normalised": {"prompt": "prompteol", "dimensions": 24, "normalize": False},
}


@pytest.mark.parametrize(("kind", "template"), [*(("llama", template) for template in TEMPLATES), ("opt", "one demonstration"), ("opt", "e5")])
def test_every_template(kind: str, template: str, directory: Callable[[str], Path]) -> None:
    role = TEMPLATES[template].get("role", "document")
    ours, theirs = (Embedder.load(str(directory(kind)), backend=backend, **TEMPLATES[template]) for backend in ("vllm", "hf"))
    vectors, expected = (embedder.encode(SENTENCES, role) for embedder in (ours, theirs))
    scale = np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs((vectors - expected) / scale).max() <= FP32_BOUND
    assert vectors.shape[1] == TEMPLATES[template].get("dimensions", vectors.shape[1])


@pytest.mark.parametrize(("kind", "with_head"), [("llama", False), ("llama", True), ("opt", True), ("qwen3", False)])
def test_an_adapter_is_served_as_transformers_applies_it(kind: str, with_head: bool, directory: Callable[[str], Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind, head=True, **KINDS[kind]) if with_head else directory(kind)
    adapter = make_adapter(model, tmp_path / "adapter", rank=12 if with_head else 8, head=with_head)
    ours, theirs, bare = (
        Embedder.load(str(model), backend=backend, adapter=of) for backend, of in (("vllm", str(adapter)), ("hf", str(adapter)), ("hf", None))
    )
    expected = theirs.encode(SENTENCES)
    assert np.abs(expected - bare.encode(SENTENCES)).max() > 0.01
    assert np.abs(ours.encode(SENTENCES) - expected).max() <= FP32_BOUND


def test_mean_pooling_computes_every_token(directory: Callable[[str], Path]) -> None:
    backend = backend_of(directory("llama"), pooling="mean")
    assert not backend.shares_prefix
    pooled = backend.embed(TokenRows.from_lists(ROWS), PREFIX)
    assert (normalize(pooled.vectors, dim=1) - reference(directory("llama"))(ROWS, "mean")).abs().max() <= FP32_BOUND
    assert (pooled.work.shared, pooled.work.computed) == (0, sum(map(len, ROWS)))


# -- prefix caching ------------------------------------------------------------------------------


def test_whole_blocks_of_the_prefix_are_computed_once(directory: Callable[[str], Path]) -> None:
    backend = backend_of(directory("llama"))
    assert backend.block_size == 32, "the smallest"
    rows = [np.concatenate([PREFIX, RANDOM.integers(3, 300, 20).astype(np.int32)]) for _ in range(50)]
    work = backend.embed(TokenRows.from_lists(rows), PREFIX).work
    assert work.shared == 50 * 64, "the first rows find the prefix already: it was computed before them"
    assert work.computed == 50 * (95 - 64)
    assert work.tokens == 50 * 95


def test_the_receipt_of_a_call_says_what_could_have_been_shared(directory: Callable[[str], Path]) -> None:
    embedder = Embedder.load(str(directory("llama")), backend="vllm", prompt="{text}", pooling="last")
    assert embedder.embed_tokens(embedder.prompter("document").tokenize(SENTENCES)[0]).work.shareable == 0
    demonstrated = Embedder.load(str(directory("llama")), backend="vllm", **TEMPLATES["three demonstrations"])
    rows, _ = demonstrated.prompter("document").tokenize(SENTENCES)
    work = demonstrated.embed_tokens(rows).work
    prefix = demonstrated.prompter("document").shared_prefix
    assert work.shareable == rows.shared(prefix).sum()
    assert work.shared == (rows.shared(prefix) // 32 * 32).sum() > 0


def test_a_prefix_that_fills_no_block_is_not_cached(directory: Callable[[str], Path]) -> None:
    assert not backend_of(directory("llama"), prefixes=[PREFIX[:31]]).shares_prefix
    assert not backend_of(directory("llama"), prefixes=[]).shares_prefix


# -- what is refused -----------------------------------------------------------------------------


def test_rows_are_refused_one_by_one(directory: Callable[[str], Path]) -> None:
    backend = backend_of(directory("llama"), max_tokens=64)
    long = np.tile(PREFIX, 2)[:65]
    rows = [ROWS[0], long, [], ROWS[3], long[:64]]
    pooled = backend.embed(TokenRows.from_lists(rows))
    assert list(pooled.failed) == [1]
    assert "65" in pooled.failed[1]
    assert not pooled.vectors[[1, 2]].any()
    assert (normalize(pooled.vectors[[0, 3, 4]], dim=1) - reference(directory("llama"))([rows[0], rows[3], rows[4]])).abs().max() <= FP32_BOUND


def test_a_token_that_the_model_lacks_fails_its_row(directory: Callable[[str], Path]) -> None:
    embedder = Embedder.load(str(directory("llama")), backend="vllm")
    embedded = embedder.embed_tokens(TokenRows.from_lists([[5, 6], [5, 99_999, 100_000], [7]]))
    assert list(embedded.failed) == [1]
    assert "token 99999 is not among the model's" in embedded.failed[1]
    assert embedded.vectors[[0, 2]].any(axis=1).all()
    assert not embedded.vectors[1].any()


@pytest.mark.parametrize("gone", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(gone: str, tmp_path: Path) -> None:
    """vLLM itself would take what is in memory for the weight."""
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "model", "llama", head=True, **KINDS["llama"])
    weights = load_file(model / "model.safetensors")
    del weights[gone]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"does not fill the model.*{gone.removeprefix('model.')}"):
        backend_of(model)


def test_a_call_that_fails_leaves_nothing_to_the_next_one(directory: Callable[[str], Path]) -> None:
    backend = backend_of(directory("llama"), token_budget=64)

    def stop(rows: int, tokens: int) -> None:
        raise KeyError("stopped")

    with pytest.raises(KeyError, match="stopped"):
        backend.embed(TokenRows.from_lists(ROWS), PREFIX, on_pack=stop)
    some = [ROWS[5], ROWS[9], ROWS[2]]
    assert (embed(backend, some, PREFIX) - reference(directory("llama"))(some)).abs().max() <= FP32_BOUND


def test_what_sentence_transformers_put_beside_the_model_changes_nothing(directory: Callable[[str], Path], tmp_path: Path) -> None:
    """vLLM would take the projection into the vectors and the length limit for the model's."""
    from safetensors.torch import save_file

    model = make_model(tmp_path / "model", "llama", **KINDS["llama"])
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": True}))
    (model / "1_Dense").mkdir()
    activation = "torch.nn.modules.linear.Identity"
    (model / "1_Dense" / "config.json").write_text(json.dumps({"in_features": 64, "out_features": 8, "bias": False, "activation_function": activation}))
    save_file({"linear.weight": torch.randn(8, 64)}, model / "1_Dense" / "model.safetensors")
    assert (embed(backend_of(model), ROWS, PREFIX) - reference(directory("llama"))(ROWS)).abs().max() <= FP32_BOUND


def test_an_argument_that_the_engine_does_not_have_is_named(directory: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"engine_arg: vLLM 0\.32.* does not take no_such_thing"):
        backend_of(directory("llama"), engine_arg=["no_such_thing=1"])


def test_an_argument_of_the_engine_wins(directory: Callable[[str], Path]) -> None:
    backend = backend_of(directory("llama"), engine_arg=["enable_prefix_caching=false", "max_num_batched_tokens=512"])
    assert not backend.shares_prefix
    assert backend.token_budget == 512


def test_heads_without_a_kernel_are_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    with pytest.raises(ModelError, match=r"heads have 8 dimensions.*set backend hf"):
        backend_of(model)
    chosen = settle(ModelSettings.make({"model": str(model)})).on(gpu=False)
    assert (chosen.backend, "heads of 8" in chosen.backend_why) == ("hf", True)


def test_auto_takes_vllm_where_it_can_and_says_why(directory: Callable[[str], Path]) -> None:
    chosen = settle(ModelSettings.make({"model": str(directory("llama"))})).on(gpu=False)
    assert chosen.backend == "vllm"
    assert "llama" in chosen.backend_why
    spread = settle(ModelSettings.make({"model": str(directory("llama")), "pooling": "weighted-mean"})).on(gpu=False)
    assert (spread.backend, "weighted-mean" in spread.backend_why) == ("hf", True)


@pytest.mark.parametrize("name", ["int8_per_channel_weight_only", "fp8_per_channel"])
def test_weights_quantised_while_they_are_loaded(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256)
    expected = Embedder.load(str(model), backend="hf").encode(SENTENCES)
    embedder = Embedder.load(str(model), backend="vllm", quantization=name)
    assert embedder.spec.compute_dtype == "bfloat16"
    cosines = (embedder.encode(SENTENCES) * expected).sum(1)
    assert 0.98 < cosines.min() < 1 - 1e-6


SPLIT = """
import signal
import numpy as np
import psutil
from llmemb_ray.embedders import Embedder
from llmemb_ray.errors import EngineDied
from tests.small_models import SENTENCES
if __name__ == "__main__":
    embedder = Embedder.load({model!r}, backend="vllm", tensor_parallel=2)
    np.save({vectors!r}, embedder.encode(SENTENCES))
    next(child for child in psutil.Process().children(recursive=True) if "Worker" in child.name()).send_signal(signal.SIGKILL)
    for _ in range(2):
        try:
            embedder.encode(SENTENCES)
        except EngineDied as error:
            print("DIED", error)
"""


def test_layers_split_over_two_workers_give_the_same_vectors_and_a_worker_killed_is_told(directory: Callable[[str], Path], tmp_path: Path) -> None:
    """Tensor parallelism, with two processes on the CPU in place of two GPUs; and an engine that has died stays dead."""
    model = make_model(tmp_path / "model", "llama", **(KINDS["llama"] | {"num_key_value_heads": 2}))
    (tmp_path / "split.py").write_text(SPLIT.format(model=str(model), vectors=str(tmp_path / "vectors.npy")))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    shown = subprocess.run([sys.executable, str(tmp_path / "split.py")], capture_output=True, text=True, timeout=240, env=environment)
    expected = Embedder.load(str(model), backend="hf").encode(SENTENCES)
    assert np.abs(np.load(tmp_path / "vectors.npy") - expected).max() <= FP32_BOUND
    assert shown.stdout.count("DIED vLLM's engine died") == 2, shown.stderr[-3000:]


def test_a_new_spec_takes_another_engine(directory: Callable[[str], Path]) -> None:
    """Several engines, one after the other, in one process: as a notebook would."""
    spec = spec_of(directory("llama"))
    vectors = [Embedder(replace(spec, compute_dtype=dtype)).encode(SENTENCES[:3]) for dtype in ("float32", "bfloat16")]
    assert 1e-6 < np.abs(vectors[0] - vectors[1]).max() < 0.05
