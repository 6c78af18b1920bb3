"""The model that is trained: its vectors are the embedder's, its steps those of one process, and what it saves is what it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

from llmemb_ray.config import FinetuneSettings
from llmemb_ray.embedders.embedder import Embedder, settle
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation import TokenRows
from llmemb_ray.storage import Storage
from llmemb_ray.training.checkpoints import Checkpoint, Checkpoints
from llmemb_ray.training.model import TrainedModel
from tests.small_models import SENTENCES, make_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand weights are not faster with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(model: Path, **values: Any) -> tuple[TrainedModel, TokenRows]:
    """With the tokens of all sentences."""
    still = {} if values.get("method") == "full" else {"lora_dropout": 0.0}
    settings = FinetuneSettings.make({"model": str(model), "train": ["rows.jsonl"], "out": "nowhere", "prompt": "prompteol"} | still | values)
    spec = settle(settings.model_settings())
    rows, _ = spec.prompter("query").tokenize(SENTENCES)
    return TrainedModel.load(spec, settings, device=CPU), rows


def vectors(trained: TrainedModel, rows: TokenRows) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return trained.eval().encode(rows).numpy()


def embedded(model: Path, **values: Any) -> np.ndarray[Any, Any]:
    return Embedder.load(str(model), device="cpu", prompt="prompteol", normalize=False, **values).encode(SENTENCES, "query")


def take_steps(trained: TrainedModel, rows: TokenRows, optimizer: Any, steps: range) -> None:
    """As the loop does: random numbers depend on the step alone."""
    for step in steps:
        torch.manual_seed(step)
        trained.train()
        optimizer.zero_grad()
        target = torch.randn(len(rows), trained.size, generator=torch.Generator().manual_seed(step))
        (trained.encode(rows) - target).pow(2).mean().backward()
        trained.clip(0.1)
        optimizer.step()


def adam(trained: TrainedModel) -> torch.optim.AdamW:
    return torch.optim.AdamW([parameter for _, parameter in trained.trainable()], lr=1e-2, weight_decay=0.1)


@pytest.mark.parametrize("values", [{"pooling": "last"}, {"pooling": "mean"}, {"pooling": "weighted-mean", "layer": 1, "dimensions": 20}])
def test_before_training_it_gives_the_vectors_of_the_base(model: Path, values: dict[str, Any]) -> None:
    trained, rows = load(model, **values)
    ours = trained.eval().encode(rows)
    assert ours.requires_grad
    assert ours.shape == (len(SENTENCES), trained.size) == (len(SENTENCES), values.get("dimensions", 32))
    assert np.abs(ours.detach().numpy() - embedded(model, **values)).max() <= 1e-5
    with pytest.raises(ValueError, match="no token"):
        trained.encode(rows.take([0, None]))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_adapter_saved_is_the_one_trained(real_models: Path, tmp_path: Path, quantization: str) -> None:
    base = real_models / "TinyStories-656K"
    trained, rows = load(base, quantization=quantization, lora_rank=4)
    before = vectors(trained, rows)
    take_steps(trained, rows, adam(trained), range(2))
    after = vectors(trained, rows)
    assert np.abs(after - before).max() > 0.05
    assert {parameter.dtype for _, parameter in trained.trainable()} == {torch.float32}
    trained.save(tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert np.abs(after - embedded(base, quantization=quantization, adapter=str(tmp_path / "adapter"))).max() <= 1e-5
    # In training mode the quantised layers take another path, which carries gradients: an evaluation between steps must not spoil it.
    with torch.no_grad():
        assert np.abs(trained.train().encode(rows).numpy() - after).max() <= 1e-5


def test_all_weights_trained_make_a_model_of_their_own(tmp_path: Path, real_models: Path) -> None:
    base = real_models / "TinyStories-656K"  # stores its token embeddings as those of the head
    trained, rows = load(base, method="full")
    take_steps(trained, rows, adam(trained), range(2))
    trained.save(tmp_path / "model")
    again = Embedder.load(str(tmp_path / "model"), device="cpu", prompt="prompteol", normalize=False)
    assert np.abs(vectors(trained, rows) - again.encode(SENTENCES, "query")).max() <= 1e-5
    assert np.abs(vectors(trained, rows) - embedded(base)).max() > 0.05
    assert again.spec.tokenizer == trained._spec.tokenizer


@pytest.mark.parametrize("values", [{"lora_dropout": 0.2}, {"method": "full"}])
def test_a_training_that_goes_on_from_a_checkpoint_is_one_that_was_not_stopped(model: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    whole, rows = load(model, **values)
    take_steps(whole, rows, adam(whole), range(6))

    first, _ = load(model, **values)
    optimizer = adam(first)
    take_steps(first, rows, optimizer, range(3))
    Checkpoints(Storage(str(tmp_path))).write(Checkpoint(step=3, state=first.state(), optimizer=first.optimizer_state(optimizer), info={}))

    second, _ = load(model, **values | {"seed": 7})
    optimizer = adam(second)
    saved = Checkpoints(Storage(str(tmp_path))).read(3)
    second.load_state(saved.state)
    second.load_optimizer_state(optimizer, saved.optimizer)
    take_steps(second, rows, optimizer, range(3, 6))
    for (name, wanted), (_, got) in zip(whole.trainable(), second.trainable(), strict=True):
        assert torch.equal(wanted, got), name
    with pytest.raises(ModelError, match="another training"):
        second.load_state({"other": torch.zeros(1)})


def test_checkpointing_computes_layers_again_and_changes_no_gradient(model: Path) -> None:
    found = []
    for on in (False, True):
        trained, rows = load(model, gradient_checkpointing=on, lora_dropout=0.2)
        passes = []
        layer = next(part for name, part in trained.module.named_modules() if name.endswith("layers.0"))
        layer.mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        torch.manual_seed(0)
        trained.train().encode(rows).pow(2).mean().backward()
        found.append((len(passes), [parameter.grad for _, parameter in trained.trainable()]))
    (once, plain), (twice, saving) = found
    assert (once, twice) == (1, 2)
    assert all(torch.equal(left, right) for left, right in zip(plain, saving, strict=True))


def test_clipping_gives_the_length_before(model: Path) -> None:
    trained, rows = load(model)
    trained.train().encode(rows).pow(2).mean().backward()
    length = np.sqrt(sum(float(parameter.grad.double().pow(2).sum()) for _, parameter in trained.trainable() if parameter.grad is not None))
    assert trained.clip(0) == pytest.approx(length, rel=1e-5)
    assert trained.clip(length / 4) == pytest.approx(length, rel=1e-5)
    assert trained.clip(0) == pytest.approx(length / 4, rel=1e-5)


def test_what_cannot_be_trained_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="compute_dtype: float16"):
        load(model, compute_dtype="float16")
    with pytest.raises(ConfigError, match=r"lora_targets: nothing .*its linear layers are down_proj, gate_proj"):
        load(model, lora_targets=["nothing"])


SPREAD: list[dict[str, Any]] = [
    {"shard_parameters": False},
    {"shard_parameters": True, "lora_targets": ["q_proj", "down_proj"], "gradient_checkpointing": True},
    {"shard_parameters": True, "lora_targets": ["q_proj", "down_proj"], "quantization": "nf4"},
    {"shard_parameters": True, "method": "full"},
]


def one_step(trained: TrainedModel, rows: TokenRows) -> tuple[float, Any, Any, Any]:
    """(gradient's length, weights before, weights after, the optimiser's state) of a step over micro-batches of four rows, with gradients held back."""
    before = trained.state()
    optimizer = torch.optim.SGD([parameter for _, parameter in trained.trainable()], lr=0.5, momentum=0.9)
    vectors(trained, rows)  # leaves nothing behind that the step would use
    trained.train()
    for start in range(0, len(rows), 4):
        part = rows.take(range(start, min(len(rows), start + 4)))
        with trained.no_sync() if start + 4 < len(rows) else contextlib.nullcontext():
            (trained.encode(part).pow(2).sum() / len(rows)).backward()
    trained.average_gradients()
    length = trained.clip(0.5)
    optimizer.step()
    state = trained.optimizer_state(optimizer)
    after = trained.state()
    if torch.distributed.is_initialized():  # What was gathered goes back to its places.
        gathered = [after, state]
        torch.distributed.broadcast_object_list(gathered, src=0)
        with torch.no_grad():
            for _, parameter in trained.trainable():
                parameter.zero_()
        trained.load_state(gathered[0])
        trained.load_optimizer_state(optimizer, gathered[1])
        again, state_again = trained.state(), trained.optimizer_state(optimizer)
        assert all(torch.equal(again[name], after[name]) for name in after)
        assert all(torch.equal(state_again["state"][name]["momentum_buffer"], value["momentum_buffer"]) for name, value in state["state"].items())
    return length, before, after, state


def work(rank: int, model: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=100))
    try:
        for number, values in enumerate(SPREAD):
            trained, rows = load(Path(model), workers="2", **values)
            found = one_step(trained, rows.take(range(rank * 7, rank * 7 + 7)))
            held = sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in trained.module.parameters())
            torch.save((*found, held / sum(parameter.numel() for parameter in trained.module.parameters())), f"{out}/{number}-{rank}.pt")
            trained.save(Path(out) / f"saved-{number}")
    finally:
        torch.distributed.destroy_process_group()


def second(_: int, model: str, out: str) -> None:
    torch.set_num_threads(1)
    work(1, model, out)


def test_two_workers_step_as_one_and_hold_half_each(model: Path, tmp_path: Path) -> None:
    assert len(SENTENCES) == 14
    other = torch.multiprocessing.spawn(second, (str(model), str(tmp_path)), nprocs=1, join=False)  # type: ignore[no-untyped-call]
    work(0, str(model), str(tmp_path))
    assert other.join()
    for number, values in enumerate(SPREAD):
        length, before, after, state = one_step(*load(model, **values))
        for rank in range(2):
            length_, before_, after_, state_, held = torch.load(tmp_path / f"{number}-{rank}.pt")
            assert length_ == pytest.approx(length, rel=1e-4)
            assert held <= 0.51 if values["shard_parameters"] else held == 1
            if rank and values["shard_parameters"]:
                assert not after_, "whole weights are gathered for the first worker"
                continue
            for name in before:
                assert torch.equal(before[name], before_[name]), "an adapter starts from the seed alone"
                assert float((after[name] - after_[name]).abs().max()) <= 1e-5, (values, name)
                assert float((state["state"][name]["momentum_buffer"] - state_["state"][name]["momentum_buffer"]).abs().max()) <= 1e-5
            assert any(not torch.equal(before[name], after[name]) for name in before)
        saved = tmp_path / f"saved-{number}"
        full = values.get("method") == "full"
        stored = load_file(saved / ("model.safetensors" if full else "adapter_model.safetensors"))
        assert len(stored) == len(after)
        for name, value in stored.items():
            assert float((value - after[name if full else name.replace(".weight", ".default.weight")]).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / "model", kind)
    trained, rows = load(model)
    take_steps(trained, rows, adam(trained), range(1))
    trained.save(tmp_path / "adapter")
    assert np.abs(vectors(trained, rows) - embedded(model, adapter=str(tmp_path / "adapter"))).max() <= 1e-5
