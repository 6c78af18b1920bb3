"""What stands beside an adapter or a model is used by itself, and what was learnt is not overruled."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmemb_ray.config import FinetuneSettings, ModelSettings
from llmemb_ray.embedders import beside, models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation.templates import e5_query
from llmemb_ray.storage import Storage
from llmemb_ray.training import outcome
from llmemb_ray.training.batches import Batches
from llmemb_ray.training.finetune import Finetuned
from llmemb_ray.training.model import TrainedModel
from tests.small_models import make_adapter, make_model

GIVEN: dict[str, Any] = {"prompt": "e5", "instruction": "Find the answer", "pooling": "mean", "dimensions": 16, "max_tokens": 60}
"""Representation of the adapters here."""

MORE = 300
"""Tokens, where ``model`` has 256 positions."""


@pytest.fixture
def base(model: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(model, tmp_path / "base"))


def trained(base: Path, place: Path, **given: Any) -> dict[str, Any]:
    """As finetune leaves an adapter, or with method full a model; returns what training.json holds."""
    settings = FinetuneSettings.make({"model": str(base), "train": ["pairs.jsonl"], "out": "out", "seed": 7} | (given or GIVEN))
    spec = settle(settings.model_settings())
    if settings.method == "full":
        TrainedModel.load(spec, settings, device=torch.device("cpu")).save(place)
    else:
        make_adapter(base, place)
    made = Finetuned(
        model="base",
        out="out",
        outcome="out/adapter",
        method="lora",
        steps=80,
        planned=100,
        score="STS-B dev",
        before=41.5,
        after=63.25,
        after_step=60,
        loss=0.5,
        tokens=12345,
        seconds=67.8,
        space=spec.space.digest,
        workers="1",
        settings={"learning_rate": 5e-4, "storage": "s3://bucket"},
        versions={"torch": "2.13.0"},
        command="llmemb finetune",
        finished=0.0,
    )
    record = {"steps": 100, "batch_size": 64, "shards": [0], "sources": [{"name": "snli", "trained": 997, "rejected": 3}]}
    return outcome.write(Storage(str(place)), spec, settings, made, Batches(Storage("."), record))


def settled(base: Path, **values: Any) -> EmbedderSpec:
    return settle(ModelSettings.make({"model": str(base)} | values))


def test_an_adapter_s_representation_is_used_by_itself_in_the_space_of_the_same_options(base: Path, tmp_path: Path) -> None:
    record = trained(base, tmp_path / "adapter")
    by_itself = settled(base, adapter=str(tmp_path / "adapter"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "bare", ignore=shutil.ignore_patterns("llmemb.json", "training.json"))
    by_hand = settled(base, adapter=str(tmp_path / "bare"), role="query", **GIVEN)
    assert by_itself.space.digest == by_hand.space.digest == record["space"]
    assert settled(base, adapter=str(tmp_path / "adapter"), role="query", **GIVEN).space.digest == record["space"], "options that say the same are no other"
    url = settled(base, adapter=f"file://{tmp_path / 'adapter'}")
    assert url.representation == by_itself.representation
    assert beside.representation_of(ModelSettings.make({"model": str(base), "adapter": str(tmp_path / "adapter")})) == by_itself.representation


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ({"prompt": "prompteol"}, "query.template"),
        ({"pooling": "last"}, "pooling: the adapter has 'mean', asked for is 'last'"),
        ({"layer": 1}, "layer"),
        ({"append_eos": False}, "append_eos"),
    ],
)
def test_an_adapter_refuses_another_representation(base: Path, tmp_path: Path, option: dict[str, Any], field: str) -> None:
    trained(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=field) as caught:
        settled(base, adapter=str(tmp_path / "adapter"), **option)
    assert "leave these options out" in str(caught.value)


def test_length_cleaning_and_instruction_were_not_learnt(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    free = settled(base, adapter=str(tmp_path / "adapter"), normalize=False, dimensions=4, clean="senteval").representation
    assert (free.normalize, free.dimensions, free.query.clean, free.document.clean) == (False, 4, "senteval", "senteval")
    learnt = settled(base, adapter=str(tmp_path / "adapter")).representation
    asked = settled(base, adapter=str(tmp_path / "adapter"), max_tokens=50, instruction="Find a duplicate", role="query").representation
    assert asked.max_tokens == 50
    assert asked.query.template == e5_query("Find a duplicate")
    assert replace(asked, max_tokens=60, query=learnt.query, document=learnt.document) == learnt
    assert settled(base, adapter=str(tmp_path / "adapter"), prompt="e5").representation == learnt, "the prompt alone keeps the instruction"


def test_a_model_s_representation_is_the_default_and_options_win(base: Path, tmp_path: Path) -> None:
    before = settled(base).space.model
    trained(base, tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "llmemb.json", base)
    learnt = settled(base)
    assert (learnt.representation.pooling, learnt.dimension) == ("mean", 16)
    assert learnt.space.model == before, "what is beside the weights is no part of them"
    changed = settled(base, pooling="last", clean="senteval").representation
    assert changed.pooling == "last"
    assert changed.query == replace(learnt.representation.query, clean="senteval"), "and the rest is kept"
    assert settled(base, prompt="prompteol").representation.query.template.startswith("This sentence")


def test_an_adapter_on_another_base_is_refused(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(base, tmp_path / "adapter")
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=f"was trained on {base}.*not on {other}.*give model {base}"):
        settled(other, adapter=str(tmp_path / "adapter"))
    (base / "generation_config.json").write_text("{}")
    settled(base, adapter=str(tmp_path / "adapter"))  # The same weights in a directory of other files.
    assert not caplog.records
    path = tmp_path / "adapter" / "training.json"
    record = json.loads(path.read_text())
    record["base"] = {"name": "org/model", "kind": "hub", "commit": "0" * 40, "weights": "sha256:0"}
    path.write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        settled(base, adapter=str(tmp_path / "adapter"))
    assert "org/model" in caplog.text, "names of two kinds cannot be compared: said, not refused"


def test_an_adapter_brings_the_positions_it_was_trained_with(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", prompt="none", rope_theta=50000.0, max_tokens=400)
    spec = settled(base, adapter=str(tmp_path / "adapter"))
    assert (spec.context.rope_theta, spec.representation.max_tokens) == (50000.0, 400), "more than the model's 256 positions"
    assert settled(base, adapter=str(tmp_path / "adapter"), rope_theta=70000).context.rope_theta == 70000, "stretched further for longer prompts"
    record = trained(base, tmp_path / "same", rope_theta=10000.0, max_tokens=400)
    same = settled(base, adapter=str(tmp_path / "same"))
    assert (same.context.to_dict(), same.representation.max_tokens, same.space.digest) == ({}, 400, record["space"]), "the model's own base too"


def test_a_model_trained_beyond_the_base_s_positions_is_in_the_space_recorded(base: Path, tmp_path: Path) -> None:
    record = trained(base, tmp_path / "model", **GIVEN | {"method": "full", "rope_theta": 50000.0, "max_tokens": MORE})
    found = settled(tmp_path / "model")
    assert found.space.digest == record["space"]
    assert found.representation.max_tokens == MORE
    assert record["context"] == {"rope_theta": 50000.0}, "how it was trained"


def test_the_record_and_the_card_say_how_it_was_made(base: Path, tmp_path: Path) -> None:
    record = trained(base, tmp_path / "adapter")
    assert record == json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["base"]["commit"] == settled(base, prompt="none").model.commit
    assert record["steps"] == {"done": 80, "planned": 100, "written": 60}
    assert record["scores"] == {"name": "STS-B dev", "before": 41.5, "after": 63.25}
    assert (record["seed"], record["data"]["sources"]) == (7, [{"name": "snli", "trained": 997, "rejected": 3}])
    _, header, text = (tmp_path / "adapter" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "peft"
    assert yaml.safe_load(header)["license"] == "unknown"
    for said in (
        record["space"],
        "| STS-B dev | 41.50 | 63.25 |",
        "| `snli` | `997` | `3` |",
        "`0.0005`",
        "Find the answer",
        "80 steps of 100 planned",
        "--adapter",
        "export-model",
    ):
        assert said in text, said


def test_pocket_is_the_package_s_model_on_every_node(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "POCKET_PATH", tmp_path / "none")
    with pytest.raises(ModelError, match="lacks"):
        settled(Path("pocket"))
    monkeypatch.setattr(models, "POCKET_PATH", base)
    trained(base, tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "llmemb.json", base)
    spec = settled(Path("pocket"))
    assert (spec.model.kind, spec.model.name) == ("package", "pocket")
    assert spec.model.commit == settled(base).model.commit
    assert spec.representation.pooling == "mean", "its own"
    monkeypatch.setattr(models, "POCKET_PATH", make_model(tmp_path / "other", seed=1))
    with pytest.raises(ModelError, match="same version of the package on every node"):
        models.fetch(spec.model)
