"""A loaded model has every weight from its checkpoint and its adapter, and is the one that was asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmemb_ray.config import ModelSettings
from llmemb_ray.embedders import Embedder, models, settle
from llmemb_ray.embedders.transformers_backend import TransformersBackend
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation import Representation, TokenRows
from llmemb_ray.search.exact import load_embedder
from llmemb_ray.storage import Storage
from tests.small_jobs import decoded, embed, opened, write
from tests.small_models import config_of, make_model, tokenizer_of

IDS = torch.arange(3, 40)[None]


def states(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """[L, D] last states of a decoder, or of a model with a head."""
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    return out.hidden_states[-1][0].float()


def load(path: Path, **options: Any) -> Any:
    return models.load_model(path, device="cpu", **({"compute_dtype": "float32"} | options))


def change_weights(directory: Path, change: Any) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


# -- checkpoints ---------------------------------------------------------------------------------


def test_a_tied_checkpoint_with_only_its_head_loads_whole(real_models: Path) -> None:
    from transformers import LlamaForCausalLM

    path = real_models / "TinyStories-656K"
    stored = load_file(path / "model.safetensors")
    assert "model.embed_tokens.weight" not in stored
    model = load(path)
    assert torch.equal(model.get_input_embeddings().weight, stored["lm_head.weight"])
    assert (states(model) - states(LlamaForCausalLM.from_pretrained(path).eval())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("head", [False, True])
def test_checkpoints_with_and_without_a_head_give_the_same_decoder(kind: str, head: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_model(tmp_path / kind, kind, head=True)
    whole = AutoModelForCausalLM.from_pretrained(directory).eval()
    if not head:
        whole.base_model.save_pretrained(directory)
    model = load(directory)
    assert type(model) is type(whole.base_model)
    assert torch.equal(states(model), states(whole))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_checkpoint_that_lacks_a_weight_is_refused(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "lacking")
    change_weights(directory, lambda weights: {name: tensor for name, tensor in weights.items() if "layers.1.mlp.up_proj" not in name})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load(directory)


def test_a_checkpoint_of_another_shape_is_refused(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "shape")
    change_weights(directory, lambda weights: {name: tensor[:, :16].contiguous() if "up_proj" in name else tensor for name, tensor in weights.items()})
    with pytest.raises(ModelError):
        load(directory)


def test_pickled_weights_are_refused_unless_allowed(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "pickled")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="allow_pickle"):
        load(directory)
    assert torch.equal(states(load(directory, allow_pickle=True)), states(load(model)))


def test_a_directory_without_weights_is_refused(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        load(directory)


def test_an_encoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "bert"
    config_of("bert").save_pretrained(directory)
    with pytest.raises(ModelError, match="decoder-only"):
        models.load_config(directory)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no_such_thing"}'])
def test_an_unreadable_configuration_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="configuration"):
        models.load_config(tmp_path)


def test_code_in_the_repository_needs_leave(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "custom")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        models.load_config(directory)


def test_a_tokenizer_is_plain_data(model: Path) -> None:
    source = models.load_tokenizer(model)
    assert source.eos_id == 1
    other = models.TokenizerSource(json=source.json, eos_id=2)
    assert len({source.digest, other.digest, models.load_tokenizer(model).digest}) == 2


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        models.load_tokenizer(tmp_path)


def test_token_limit_and_dimension_are_settled_against_the_model() -> None:
    config = config_of("llama")
    assert models.settle_max_tokens(Representation(), config).max_tokens == 256
    assert models.settle_max_tokens(Representation(max_tokens=9), config).max_tokens == 9
    assert models.settle_max_tokens(Representation(), config_of("bloom")).max_tokens == 4096
    with pytest.raises(ConfigError, match="256 positions"):
        models.settle_max_tokens(Representation(max_tokens=257), config)
    assert models.settle_dimension(Representation(), 32) == 32
    assert models.settle_dimension(Representation(dimensions=5), 32) == 5
    with pytest.raises(ConfigError, match="32"):
        models.settle_dimension(Representation(dimensions=33), 32)


# -- longer prompts ------------------------------------------------------------------------------


def extended(directory: Path, kind: str, **changes: Any) -> tuple[Path, Path]:
    """A model of 256 positions, and the same with 512 and other changes written into its configuration, a nested one by layers."""
    model = make_model(directory / kind, kind, **changes.pop("shape", {}))
    saved = shutil.copytree(model, directory / f"{kind}-saved")
    config = json.loads((saved / "config.json").read_text())
    for name, value in ({"max_position_embeddings": 512} | changes).items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (saved / "config.json").write_text(json.dumps(config))
    return model, saved


LONG = [*("one two three four five six " * count for count in (1, 4, 15)), "a b c"]
"""Prompts of up to 362 tokens."""

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"rope_theta": 1e6, "sliding_window": 0}, {"rope_parameters": {"rope_theta": 1e6}}),
    "phi": ({"rope_theta": 500}, {"rope_parameters": {"rope_theta": 500.0}}),
    "mistral": ({"rope_theta": 1e5, "sliding_window": 0}, {"rope_parameters": {"rope_theta": 1e5}, "sliding_window": None}),
    "gemma3_text": (
        {"rope_theta": 1e4, "sliding_window": 40},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}, "sliding_window": 40},
    ),
}
"""Settings, and the changes of config.json that they stand for."""


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_changed_context_gives_the_vectors_of_a_model_saved_with_it(kind: str, tmp_path: Path) -> None:
    settings, changes = SETTINGS[kind]
    model, saved = extended(tmp_path, kind, **changes)
    spec = settle(ModelSettings.make({"model": str(model), "prompt": "none", "max_tokens": 400, "backend": "hf", **settings}))
    expected = Embedder.load(str(saved), prompt="none", max_tokens=400, backend="hf").encode(LONG)
    for plain in (False, True):
        assert np.abs(Embedder(spec, plain=plain).encode(LONG) - expected).max() < 1e-5
    assert len(spec.prompter("document").tokenize(LONG[2:3])[0][0]) > 256
    unchanged = Embedder.load(str(model), prompt="none", backend="hf")
    assert np.abs(unchanged.encode(LONG[:2]) - expected[:2]).max() > 1e-3
    assert spec.space.digest != unchanged.spec.space.digest


def test_a_window_switched_off_is_none_at_all_where_layers_differ(tmp_path: Path) -> None:
    model, saved = extended(tmp_path, "gemma3_text", sliding_window=512)
    expected = Embedder.load(str(saved), prompt="none", backend="hf", max_tokens=256).encode(LONG)
    assert np.abs(Embedder.load(str(model), prompt="none", backend="hf", sliding_window=0).encode(LONG) - expected).max() < 1e-5


def test_what_changes_nothing_keeps_the_space_of_versions_without_it(model: Path) -> None:
    spec = settle(ModelSettings.make({"model": str(model), "rope_theta": 10000, "sliding_window": 0}))
    assert list(spec.space.to_dict()) == ["representation", "model", "adapter", "tokenizer"]
    changed = settle(ModelSettings.make({"model": str(model), "rope_theta": 10001}))
    assert changed.space.to_dict() == spec.space.to_dict() | {"context": {"rope_theta": 10001.0}}


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        ("opt", {"rope_theta": 1e5}, "no base of rotary positions; leave"),
        ("bloom", {"rope_theta": 1e5}, "no base of rotary positions; leave"),
        ("gpt2", {"max_tokens": 257}, "256 positions, and its table of positions ends there; lower max_tokens"),
        ("llama", {"max_tokens": 257}, "stretch them with rope_theta"),
        ("llama", {"sliding_window": 8}, "no sliding window; leave"),
        ("qwen3", {"sliding_window": 8}, "no sliding window; leave"),
    ],
)
def test_a_context_that_the_model_cannot_have_is_refused(kind: str, settings: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, kind)
    with pytest.raises(ConfigError, match=complaint):
        settle(ModelSettings.make({"model": str(model), **settings}))


def test_beyond_its_positions_a_model_with_dynamic_scaling_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ConfigError, match="dynamic"):
        settle(ModelSettings.make({"model": str(model), "max_tokens": 257, "rope_theta": 1e5}))
    assert settle(ModelSettings.make({"model": str(model), "max_tokens": 256, "rope_theta": 1e5})).representation.max_tokens == 256


def test_queries_of_a_run_are_embedded_in_its_context(model: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", LONG, id=list("abcd"))
    embed(corpus, tmp_path / "out", model, id_column="id", prompt="none", rope_theta=1e6, max_tokens=400)
    queries = load_embedder(opened(tmp_path / "out")).encode(LONG)
    assert np.abs(queries - np.stack([decoded(tmp_path / "out")[id_] for id_ in "abcd"])).max() < 1e-5


@pytest.mark.vllm
def test_vllm_has_the_same_context(tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, saved = extended(tmp_path, "mistral", shape=wide, rope_parameters={"rope_theta": 1e5}, sliding_window=None)
    expected = Embedder.load(str(saved), prompt="none", max_tokens=400, backend="hf").encode(LONG)
    ours = Embedder.load(str(model), prompt="none", max_tokens=400, backend="vllm", rope_theta=1e5, sliding_window=0).encode(LONG)
    assert np.abs(ours - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gemma", "qwen3", "gpt_neox"])
def test_flops_are_twice_the_weights_of_the_layers(kind: str, tmp_path: Path) -> None:
    model = load(make_model(tmp_path / kind, kind))
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name
    )
    assert models.flops_per_token(model.config) == pytest.approx(2 * weights)


def test_of_a_model_for_text_and_images_the_text_decoder_is_taken(tmp_path: Path) -> None:
    from transformers import AutoModel, Gemma3Config

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = config_of("gemma3_text").to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=500, boi_token_index=501, eoi_token_index=502)
    torch.manual_seed(0)
    whole = AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.config.model_type == models.load_config(tmp_path).model_type == "gemma3_text"
    with torch.no_grad():
        expected = whole(input_ids=IDS).last_hidden_state[0, -1]
    backend = TransformersBackend(model)
    assert backend.mode == "packed"
    assert (backend.embed(TokenRows.from_lists([IDS[0].numpy()])).vectors[0] - expected).abs().max() < 1e-5


# -- adapters ------------------------------------------------------------------------------------


def make_adapter(directory: Path, path: Path, *, head: bool, targets: list[str]) -> Any:
    """Saves a LoRA adapter with random weights; returns peft's own model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    whole = AutoModelForCausalLM.from_pretrained(directory)
    adapted = get_peft_model(
        whole if head else whole.base_model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM" if head else "FEATURE_EXTRACTION")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(path)
    return adapted.eval()


TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj"],
    "opt": ["q_proj", "fc1"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "mamba": ["in_proj"],
    "mistral": ["q_proj"],
}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_give_peft_s_own_states(kind: str, head: bool, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", kind, head=True)
    expected = states(make_adapter(directory, tmp_path / "adapter", head=head, targets=TARGETS[kind]))
    assert (states(load(directory)) - expected).abs().max() > 0.1
    model = load(directory, adapter=tmp_path / "adapter")
    assert (states(model) - expected).abs().max() < 1e-4
    vectors = TransformersBackend(model).embed(TokenRows.from_lists([IDS[0].numpy()])).vectors
    assert (vectors[0] - expected[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("head", [False, True])
def test_adapters_of_a_tied_checkpoint(head: bool, real_models: Path, tmp_path: Path) -> None:
    directory = real_models / "TinyStories-656K"
    expected = states(make_adapter(directory, tmp_path, head=head, targets=["q_proj", "down_proj"]))
    model = load(directory, adapter=tmp_path)
    assert (states(load(directory)) - expected).abs().max() > 0.1
    assert (states(model) - expected).abs().max() < 1e-3


def test_an_adapter_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    deeper = make_model(tmp_path / "deeper", "llama", num_hidden_layers=3)
    make_adapter(deeper, tmp_path / "adapter", head=False, targets=["q_proj"])
    with pytest.raises(ModelError, match="adapter"):
        load(model, adapter=tmp_path / "adapter")
    wider = make_model(tmp_path / "wider", "llama", hidden_size=64)
    make_adapter(wider, tmp_path / "wide-adapter", head=False, targets=["q_proj"])
    with pytest.raises(ModelError, match="adapter"):
        load(model, adapter=tmp_path / "wide-adapter")


def test_an_adapter_that_lacks_a_weight_is_refused(model: Path, tmp_path: Path) -> None:
    make_adapter(model, tmp_path, head=False, targets=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    lost = min(weights)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0"):
        load(model, adapter=tmp_path)


# -- quantised weights ---------------------------------------------------------------------------


def test_nf4_is_close_to_full_precision(real_models: Path) -> None:
    path = real_models / "TinyStories-656K"
    exact, quantised = load(path), load(path, quantization="nf4")
    assert any("4bit" in type(module).__name__ for module in quantised.modules())
    cosines = torch.nn.functional.cosine_similarity(states(exact), states(quantised))
    assert cosines.mean() > 0.95
    assert cosines.mean() < 1 - 1e-6
    rows = TokenRows.from_lists([IDS[0, :n].numpy() for n in (1, 9, 20, 37)])
    single = torch.stack([states(quantised, torch.from_numpy(rows[row].astype(np.int64))[None])[-1] for row in range(len(rows))])
    packed = TransformersBackend(quantised).embed(rows).vectors
    assert torch.nn.functional.cosine_similarity(packed, single).min() > 0.9999


def test_llm_int8_is_close_to_full_precision(real_models: Path) -> None:
    """Its vectors may depend on their neighbours (outlier columns are chosen a batch at a time), so only closeness is asked."""
    path = real_models / "TinyStories-656K"
    exact, quantised = load(path), load(path, quantization="llm.int8")
    assert any("8bit" in type(module).__name__ for module in quantised.modules())
    cosines = torch.nn.functional.cosine_similarity(states(exact), states(quantised))
    assert cosines.mean() > 0.99
    assert cosines.mean() < 1 - 1e-7
    rows = TokenRows.from_lists([IDS[0, :n].numpy() for n in (5, 9, 20, 37)])
    packed, plain = TransformersBackend(quantised).embed(rows).vectors, TransformersBackend(exact).embed(rows).vectors
    assert torch.nn.functional.cosine_similarity(packed, plain).min() > 0.98


def test_nf4_with_an_adapter_is_peft_s_own(real_models: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = real_models / "TinyStories-656K"
    make_adapter(model, tmp_path, head=False, targets=["q_proj", "v_proj"])
    adapted = load(model, quantization="nf4", adapter=tmp_path)
    before = states(load(model, quantization="nf4"))
    expected = states(PeftModel.from_pretrained(load(model, quantization="nf4"), tmp_path).eval())
    assert (states(adapted) - expected).abs().max() < 1e-4
    assert (expected - before).abs().max() > 0.1


# -- where models come from ----------------------------------------------------------------------


def test_a_directory_is_known_by_its_contents(model: Path, tmp_path: Path) -> None:
    source = models.resolve(str(model))
    assert source.kind == "directory"
    moved = shutil.copytree(model, tmp_path / "moved")
    assert models.resolve(str(moved)).commit == source.commit
    (moved / "README.md").write_text("about")
    assert models.resolve(str(moved)).commit == source.commit

    def nudge(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights["norm.weight"][0] += 1
        return weights

    change_weights(moved, nudge)
    assert models.resolve(str(moved)).commit != source.commit


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_configuration_and_tokenizer_belong_to_the_commit(name: str, model: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(model, tmp_path / "moved")
    (moved / name).write_text((moved / name).read_text() + " ")
    assert models.resolve(str(moved)).commit != models.resolve(str(model)).commit


def test_a_large_file_is_known_by_its_size_and_blocks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(models.SAMPLED_BLOCKS * models.SAMPLED_BLOCK_BYTES * 2)
    commits = []
    for position in (None, 0, len(weights) - 1):
        changed = bytearray(weights)
        if position is not None:
            changed[position] = 1
        (tmp_path / "model.safetensors").write_bytes(changed)
        commits.append(models.resolve(str(tmp_path)).commit)
    (tmp_path / "model.safetensors").write_bytes(weights + b"\0")
    commits.append(models.resolve(str(tmp_path)).commit)
    assert len(set(commits)) == 4


@pytest.mark.parametrize(
    ("name", "complaint"), [("./nowhere", "no such directory"), ("a/b/c", "no such directory"), ("someone/no-such-model", "HF_HUB_OFFLINE")]
)
def test_a_model_that_is_nowhere(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=complaint) as error:
        models.resolve(name)
    assert name in str(error.value)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        models.resolve(str(tmp_path), what="adapter")


def test_a_directory_has_no_revisions(model: Path) -> None:
    with pytest.raises(ModelError, match="revision"):
        models.resolve(str(model), "main")


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_a_url_is_brought_to_the_node_once(protocol: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/model" if protocol == "memory" else f"file://{tmp_path}/model"
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    for file in model.iterdir():
        fs.pipe_file(f"{root}/{file.name}", file.read_bytes())
    source = models.resolve(url)
    assert source.kind == "url"
    assert source.commit == models.resolve(str(model)).commit
    light = models.fetch(source, weights=False)
    assert (light / "tokenizer.json").is_file()
    assert not list(light.glob("*.safetensors"))
    path = models.fetch(source)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {file.name: file.read_bytes() for file in model.iterdir()}
    fs.rm(root, recursive=True)
    assert models.fetch(source) == path
    assert torch.equal(states(load(path)), states(load(model)))


def test_an_interrupted_copy_is_not_taken_for_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(model, tmp_path / "model")
    source = models.resolve(f"file://{copy}")
    opened = Storage.open

    def breaks_off(storage: Storage, path: str, size: int | None = None) -> Any:
        if path.endswith(".safetensors"):
            raise ConnectionResetError("gone")
        return opened(storage, path, size)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "open", breaks_off)
        with pytest.raises(ConnectionResetError):
            models.fetch(source)
    assert torch.equal(states(load(models.fetch(source))), states(load(model)))


def test_a_directory_missing_on_this_node_is_named(tmp_path: Path) -> None:
    make_model(tmp_path / "m", tokenizer=tokenizer_of())
    source = models.resolve(str(tmp_path / "m"))
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ModelError, match="on this node"):
        models.fetch(source)


def test_a_hub_that_cannot_be_reached_is_told_without_a_traceback() -> None:
    code = (
        "from llmemb_ray.embedders.models import resolve\nfrom llmemb_ray.errors import ModelError\n"
        "try:\n    resolve('no-such-owner/no-such-model-here')\nexcept ModelError as error:\n    print('refused:', error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("refused: model no-such-owner/no-such-model-here"), done.stdout + done.stderr
