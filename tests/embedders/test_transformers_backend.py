"""Vectors are those of one-by-one transformers inference, whatever goes with them; memory that runs out loses no row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from llmemb_ray.embedders import attention, capabilities
from llmemb_ray.embedders.models import load_model
from llmemb_ray.embedders.transformers_backend import TransformersBackend, output_size
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation import Pooling, TokenRows
from llmemb_ray.representation.representation import POOLINGS
from tests.embedders.inference import FP32_BOUND, PREFIX, RANDOM, ROWS, Reference, assert_spread, embed, reference_of
from tests.small_models import config_of, make_model

PACKED_KINDS = ("opt", "opt-350m", "llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi", "phi3", "gemma", "gemma3_text")
PADDED_KINDS = ("gemma2", "bloom", "mamba")
KINDS = (*PACKED_KINDS, *PADDED_KINDS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    made = {kind: make_model(root / kind, kind) for kind in KINDS}
    return {**made, "TinyStories-656K": real_models / "TinyStories-656K"}


@pytest.fixture(scope="module")
def references(directories: dict[str, Path]) -> dict[str, Reference]:
    from transformers import AutoModel, AutoModelForCausalLM

    made = {}
    for kind, directory in directories.items():
        class_ = AutoModelForCausalLM if kind == "TinyStories-656K" else AutoModel
        made[kind] = reference_of(class_.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval())
    return made


def backend_of(directory: Path, **options: Any) -> TransformersBackend:
    return TransformersBackend(load_model(directory, device="cpu", compute_dtype=options.pop("compute_dtype", "float32")), **({"token_budget": 200} | options))


def test_every_row_of_the_table_has_its_test() -> None:
    assert {config_of(kind).model_type for kind in PACKED_KINDS} == set(capabilities.PACKED)
    assert not {config_of(kind).model_type for kind in PADDED_KINDS} & set(capabilities.PACKED)


@pytest.mark.parametrize("kind", [*KINDS, "TinyStories-656K"])
def test_vectors_are_those_of_one_by_one_inference(kind: str, directories: dict[str, Path], references: dict[str, Reference]) -> None:
    expected = references[kind](ROWS, "last", -1)
    assert_spread(expected)
    backend = backend_of(directories[kind])
    assert backend.mode == ("padded" if kind in PADDED_KINDS else "packed")
    assert (embed(backend, ROWS, PREFIX) - expected).abs().max() <= FP32_BOUND
    assert (embed(backend, ROWS) - expected).abs().max() <= FP32_BOUND
    single = torch.cat([embed(backend, [row], PREFIX) for row in ROWS[:5]])
    assert (single - expected[:5]).abs().max() <= FP32_BOUND


@pytest.mark.parametrize("layer", [-1, 1, 0, 2])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["opt", "opt-350m", "llama", "mistral", "gpt2", "gemma3_text", "gemma2", "mamba", "TinyStories-656K"])
def test_every_pooling_and_layer(kind: str, pooling: Pooling, layer: int, directories: dict[str, Path], references: dict[str, Reference]) -> None:
    expected = references[kind](ROWS, pooling, layer)
    backend = backend_of(directories[kind], pooling=pooling, layer=layer)
    vectors = embed(backend, ROWS, PREFIX)
    assert vectors.shape[1] == output_size(backend.config, layer)
    assert (vectors - expected).abs().max() <= FP32_BOUND


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_a_packed_architecture_runs_padded_with_the_same_vectors(kind: str, directories: dict[str, Path], references: dict[str, Reference]) -> None:
    backend = backend_of(directories[kind], packed=False, pooling="mean")
    assert backend.mode == "padded"
    assert (embed(backend, ROWS, PREFIX) - references[kind](ROWS, "mean", -1)).abs().max() <= FP32_BOUND


@pytest.fixture(scope="module")
def backends(directories: dict[str, Path]) -> dict[str, TransformersBackend]:
    return {kind: backend_of(directories[kind], pooling="weighted-mean") for kind in ("opt", "llama", "mistral", "gemma2")}


@pytest.mark.parametrize("kind", ["opt", "llama", "mistral", "gemma2"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_neighbours_order_and_budget_do_not_matter(
    kind: str, data: st.DataObject, backends: dict[str, TransformersBackend], references: dict[str, Reference]
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=20))
    prefix = data.draw(st.sampled_from([None, PREFIX, PREFIX[:5], PREFIX[:2]]))
    backend = backends[kind]
    backend.budget.value = data.draw(st.integers(1, 2000))
    rows = [ROWS[index] for index in chosen]
    assert (embed(backend, rows, prefix) - references[kind](rows, "weighted-mean", -1)).abs().max() <= FP32_BOUND


@pytest.mark.parametrize("kind", ["opt", "opt-350m", "llama"])
def test_vectors_are_those_of_the_first_paper_s_code(kind: str, tmp_path: Path) -> None:
    """Its way: the model with its head, a batch padded on the left with id 0, the last state at the last place."""
    from transformers import AutoModelForCausalLM

    directory = make_model(tmp_path / kind, kind, head=True)
    paper = AutoModelForCausalLM.from_pretrained(directory, output_hidden_states=True, attn_implementation="eager").eval()
    longest = max(map(len, ROWS))
    ids_BL = torch.tensor(np.stack([np.pad(row, (longest - len(row), 0)) for row in ROWS]).astype(np.int64))
    mask_BL = torch.tensor(np.stack([np.arange(longest) >= longest - len(row) for row in ROWS]).astype(np.int64))
    with torch.no_grad():
        expected = paper(input_ids=ids_BL, attention_mask=mask_BL).hidden_states[-1][:, -1, :]
    assert (embed(backend_of(directory), ROWS, PREFIX) - normalize(expected, dim=1)).abs().max() <= FP32_BOUND


@pytest.mark.parametrize("kind", ["opt", "llama", "mistral", "gpt2", "gemma", "gemma2", "bloom", "TinyStories-656K"])
def test_bfloat16_is_as_near_as_its_own_noise(kind: str, directories: dict[str, Path], references: dict[str, Reference]) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    class_ = AutoModelForCausalLM if kind == "TinyStories-656K" else AutoModel
    exact = references[kind](ROWS, "last", -1)
    plain = reference_of(class_.from_pretrained(directories[kind], attn_implementation="eager", dtype=torch.bfloat16).eval())(ROWS, "last", -1)
    ours = embed(backend_of(directories[kind], compute_dtype="bfloat16"), ROWS, PREFIX)
    noise = 1 - (plain * exact).sum(1)
    assert (1 - (ours * plain).sum(1) <= torch.maximum(torch.full_like(noise, 1e-3), 3 * noise)).all()
    assert (1 - (ours * exact).sum(1) <= torch.maximum(torch.full_like(noise, 1e-3), 3 * noise)).all()


def test_capped_attention_scores_are_capped(tmp_path: Path) -> None:
    """Gemma 2 squashes its scores at 50; with scores that large, attention without the cap gives other vectors."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    directory = make_model(tmp_path / "gemma2", "gemma2")
    weights = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor * 8 if "q_proj" in name or "k_proj" in name else tensor for name, tensor in weights.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    capped = reference_of(AutoModel.from_pretrained(directory, attn_implementation="eager").eval())(ROWS, "last", -1)
    uncapped = reference_of(AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval())(ROWS, "last", -1)
    assert (capped - uncapped).abs().max() > 10 * FP32_BOUND
    assert (embed(backend_of(directory), ROWS) - capped).abs().max() <= FP32_BOUND


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prefix", [PREFIX, np.concatenate([PREFIX, PREFIX, PREFIX])])
def test_longrope_rows_are_kept_apart_by_length(packed: bool, prefix: Any, tmp_path: Path) -> None:
    """Phi-3's 128k models turn a whole forward pass by other angles if one sequence in it is long."""
    from transformers import AutoModel

    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    directory = make_model(tmp_path / "phi3", "phi3", rope_scaling=scaling, original_max_position_embeddings=32)
    rows = [*ROWS, np.concatenate([prefix[:25], ROWS[0]])[:31], np.concatenate([prefix, ROWS[0]])]
    expected = reference_of(AutoModel.from_pretrained(directory, attn_implementation="eager").eval())(rows, "mean", -1)
    assert (embed(backend_of(directory, packed=packed, pooling="mean"), rows, prefix) - expected).abs().max() <= FP32_BOUND


def test_the_prefix_is_computed_once(directories: dict[str, Path]) -> None:
    rows = [np.concatenate([PREFIX, row]) for row in ROWS]
    work = backend_of(directories["llama"]).embed(TokenRows.from_lists(rows), PREFIX).work
    own = sum(map(len, ROWS))
    assert work.tokens == own + len(ROWS) * len(PREFIX)
    assert work.computed == own
    assert work.shared == len(ROWS) * len(PREFIX)
    assert work.padding == 0


def test_no_rows(directories: dict[str, Path]) -> None:
    pooled = backend_of(directories["opt-350m"]).embed(TokenRows.from_lists([]), PREFIX)
    assert pooled.vectors.shape == (0, 16)


def test_an_empty_row_gets_a_zero_vector_and_harms_no_other(directories: dict[str, Path], references: dict[str, Reference]) -> None:
    pooled = backend_of(directories["llama"]).embed(TokenRows.from_lists([ROWS[0], [], ROWS[1]]), PREFIX)
    assert not pooled.vectors[1].any()
    assert (normalize(pooled.vectors[[0, 2]], dim=1) - references["llama"](ROWS[:2], "last", -1)).abs().max() <= FP32_BOUND


def out_of_memory_above(backend: TransformersBackend, tokens: int) -> None:
    """A machine with memory for so many tokens: the model's forward raises what CUDA raises."""
    forward = backend.model.forward

    def limited(*arguments: Any, **options: Any) -> Any:
        if options["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*arguments, **options)

    backend.model.forward = limited


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_when_memory_runs_out_packs_are_halved_and_all_vectors_are_right(kind: str, directories: dict[str, Path], references: dict[str, Reference]) -> None:
    backend = backend_of(directories[kind], token_budget=1500)
    out_of_memory_above(backend, 100)
    pooled = backend.embed(TokenRows.from_lists(ROWS), PREFIX)
    assert not pooled.failed
    assert (normalize(pooled.vectors, dim=1) - references[kind](ROWS, "last", -1)).abs().max() <= FP32_BOUND
    assert pooled.work.out_of_memory >= 1
    assert 25 <= backend.budget.value <= 100
    assert not backend.budget.searching
    again = backend.embed(TokenRows.from_lists(ROWS), PREFIX)
    assert again.work.out_of_memory == 0


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_row_too_large_alone_fails_alone(kind: str, directories: dict[str, Path], references: dict[str, Reference]) -> None:
    backend = backend_of(directories[kind], token_budget=1500)
    out_of_memory_above(backend, 100)
    huge = RANDOM.integers(3, 300, 150).astype(np.int32)
    rows = [*ROWS[:8], huge, *ROWS[8:]]
    pooled = backend.embed(TokenRows.from_lists(rows), PREFIX)
    assert list(pooled.failed) == [8]
    assert "150 tokens" in pooled.failed[8]
    assert not pooled.vectors[8].any()
    rest = [index for index in range(len(rows)) if index != 8]
    assert (normalize(pooled.vectors[rest], dim=1) - references[kind](ROWS, "last", -1)).abs().max() <= FP32_BOUND


def test_all_rows_too_large(directories: dict[str, Path]) -> None:
    backend = backend_of(directories["llama"])
    out_of_memory_above(backend, 2)
    pooled = backend.embed(TokenRows.from_lists([row for row in ROWS if len(row) > 2]))
    assert len(pooled.failed) == len(pooled.vectors) == len([row for row in ROWS if len(row) > 2])
    assert pooled.vectors.shape[1] == 32


def test_progress_counts_every_row_and_token_once(directories: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    backend = backend_of(directories["llama"])
    backend.embed(TokenRows.from_lists(ROWS), PREFIX, on_pack=lambda rows, tokens: seen.append((rows, tokens)))
    assert [sum(column) for column in zip(*seen, strict=True)] == [len(ROWS), sum(map(len, ROWS))]
    assert len(seen) > 1


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(layer: int, directories: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="-3 to 2"):
        backend_of(directories["llama"], layer=layer)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModel

    with pytest.raises(ModelError, match="not causal"):
        TransformersBackend(AutoModel.from_pretrained(make_model(tmp_path / "bert", "bert")).eval())


@pytest.mark.parametrize("change", [{"use_bidirectional_attention": True}, {"attn_logit_softcapping": 30.0}])
def test_what_packed_attention_lacks_is_not_packed(change: dict[str, Any]) -> None:
    assert capabilities.mode(config_of("gemma3_text")) == "packed"
    assert capabilities.mode(config_of("gemma3_text", **change)) == "padded"


def test_a_model_whose_packed_pass_cannot_run_is_padded_and_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As on a GPU without a kernel for the model's precision or head size."""

    def no_kernel(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    path = make_model(tmp_path / "llama", "llama")
    rows = TokenRows.from_lists([np.arange(3, 20, dtype=np.int32), np.arange(5, 9, dtype=np.int32)])
    wanted = TransformersBackend(load_model(path)).embed(rows).vectors
    monkeypatch.setattr(attention, "cascade", no_kernel)
    backend = TransformersBackend(load_model(path))
    assert backend.mode == "padded"
    assert "fp16 and bf16" in caplog.text
    torch.testing.assert_close(backend.embed(rows).vectors, wanted, atol=1e-5, rtol=0)
