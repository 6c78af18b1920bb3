"""Exports give the vectors of what they were made of: merged models, and directories of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmemb_ray.config import ExportModelSettings
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import ConfigError, ModelError, OutputError
from llmemb_ray.representation import Representation
from llmemb_ray.representation.representation import Form, preset
from llmemb_ray.training.export_model import ExportedModel, export_model
from tests.small_models import SENTENCES, make_adapter, make_model

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (extra: test)")
SentenceTransformer = sentence_transformers.SentenceTransformer

LONG = "The quick brown fox jumps over the lazy dog — naïve café 数据. " * 30
TEXTS = [*SENTENCES, LONG, "x" * 900, LONG + "?"]


def of_preset(prompt: str, instruction: str | None = None, **values: Any) -> Representation:
    document, query, ends = preset(prompt, instruction=instruction, role="query", clean=values.pop("clean", "none"))
    return Representation(document=document, query=query, append_eos=ends, max_tokens=48, **values)


EOL = of_preset("prompteol")
E5 = of_preset("e5", "Given a question, find {the} answer")
REPRESENTATIONS = {
    "prompteol": of_preset("prompteol", clean="senteval"),
    "e5": E5,
    "mean": of_preset("none", pooling="mean", layer=1, dimensions=20, normalize=False),
    "two": Representation(document=Form(template="doc {text}"), query=Form(template="{{q}} {text} end"), max_tokens=40, pooling="weighted-mean"),
}

LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [2.0] * 4, "long_factor": [2.0] * 4}
"""Of heads of 8 dimensions; the factor of attention is taken from the positions."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time by a second one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "llama", head=True)


def trained(base: Path, out: Path, representation: Representation = EOL, **changes: Any) -> Path:
    """As finetune leaves it: OUT/adapter with its representation."""
    make_adapter(base, out / "adapter", **changes)
    representation.save(out / "adapter")
    return out


def exported(out: Path, dest: Path, **values: Any) -> ExportedModel:
    return export_model(ExportModelSettings.make({"trained": str(out), "dest": str(dest), "dtype": "float32"} | values))


def farthest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.mark.parametrize("head", [False, True])
def test_a_merged_model_gives_the_vectors_of_base_and_adapter_and_keeps_the_head(base: Path, head: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = trained(base, tmp_path / "out", head=head)
    made = exported(out, tmp_path / "merged")
    expected = Embedder.load(str(base), adapter=str(out / "adapter")).encode(TEXTS)
    assert farthest(expected, Embedder.load(str(base), max_tokens=48).encode(TEXTS)) > 0.05, "the adapter does something"
    merged = Embedder.load(made.dest)
    assert farthest(merged.encode(TEXTS), expected) < 1e-5
    assert merged.spec.representation == EOL, "by itself"
    assert merged.spec.space.digest == made.space
    whole, info = AutoModelForCausalLM.from_pretrained(made.dest, output_loading_info=True)
    assert not info["missing_keys"]
    assert farthest(whole.lm_head.weight.detach(), AutoModelForCausalLM.from_pretrained(base).lm_head.weight.detach()) == 0


def test_a_base_without_a_head_and_one_with_tied_weights_are_merged_too(model: Path, real_models: Path, tmp_path: Path) -> None:
    for place in (model, real_models / "TinyStories-656K"):
        out = trained(place, tmp_path / place.name)
        made = exported(out, tmp_path / f"{place.name}-merged")
        expected = Embedder.load(str(place), adapter=str(out / "adapter")).encode(TEXTS)
        assert farthest(Embedder.load(made.dest).encode(TEXTS), expected) < 1e-5


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_sentence_transformers_gives_the_same_vectors(base: Path, name: str, tmp_path: Path) -> None:
    out = trained(base, tmp_path / "out", REPRESENTATIONS[name])
    made = exported(out, tmp_path / "st", to="sentence-transformers")
    ours, theirs = Embedder.load(str(base), adapter=str(out / "adapter")), SentenceTransformer(made.dest, trust_remote_code=True, device="cpu")
    documents, queries = ours.encode([*TEXTS, ""], "document"), ours.encode([*TEXTS, ""], "query")
    assert farthest(theirs.encode([*TEXTS, ""]), documents) < 1e-5
    assert farthest(theirs.encode_document([*TEXTS, ""]), documents) < 1e-5
    assert farthest(theirs.encode_query([*TEXTS, ""], batch_size=4), queries) < 1e-5
    assert (farthest(documents, queries) > 0.05) is (name in ("e5", "two"))
    assert theirs.get_embedding_dimension() == documents.shape[1]
    if name != "two":
        return
    theirs.save(str(tmp_path / "again"))
    assert farthest(SentenceTransformer(str(tmp_path / "again"), trust_remote_code=True, device="cpu").encode_query(TEXTS), queries[:-1]) < 1e-5
    assert farthest(Embedder.load(made.dest).encode(TEXTS, "query"), queries[:-1]) < 1e-5, "llmemb takes the directory too"


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32})])
def test_positions_beyond_the_base_s_are_those_of_the_export(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind, max_position_embeddings=64, **changes)
    make_adapter(base, tmp_path / "out")
    values: dict[str, Any] = {"rope_theta": 50000.0, "max_tokens": 200}
    ours = Embedder.load(str(base), adapter=str(tmp_path / "out"), **values)
    ours.spec.representation.save(tmp_path / "out")
    (tmp_path / "out" / "training.json").write_text(json.dumps({"context": {"rope_theta": 50000.0}}))
    expected = ours.encode(TEXTS)
    assert farthest(expected, Embedder.load(str(base), adapter=str(tmp_path / "out"), rope_theta=50000.0, max_tokens=64).encode(TEXTS)) > 0.01, "longer ones"
    for to in ("merged", "sentence-transformers"):
        made = exported(tmp_path / "out", tmp_path / to, to=to)
        again = Embedder.load(made.dest)
        assert again.spec.representation.max_tokens == 200
        assert again.spec.space.digest == made.space
        assert farthest(again.encode(TEXTS), expected) < 1e-5
    theirs = SentenceTransformer(made.dest, trust_remote_code=True, device="cpu")
    assert farthest(theirs.encode(TEXTS), expected) < 1e-5


def test_prompts_of_sentence_transformers_replace_the_instruction(base: Path, tmp_path: Path) -> None:
    other = of_preset("e5", "Another task")
    made = exported(trained(base, tmp_path / "out", of_preset("e5", "One task")), tmp_path / "st", to="sentence-transformers")
    theirs = SentenceTransformer(made.dest, trust_remote_code=True, device="cpu")
    ours = Embedder.load(str(base), adapter=str(tmp_path / "out" / "adapter"))
    assert farthest(theirs.encode(TEXTS, prompt_name="query"), ours.encode(TEXTS, "query")) < 1e-5
    assert farthest(theirs.encode(TEXTS, prompt="Instruct: Another task\nQuery: "), ours.under(other).encode(TEXTS, "query")) < 1e-5


def test_a_text_of_which_nothing_fits_is_refused_as_llmemb_does(base: Path, tmp_path: Path) -> None:
    made = exported(trained(base, tmp_path / "out"), tmp_path / "st", to="sentence-transformers")
    with pytest.raises(ValueError, match="no token of the text"):
        SentenceTransformer(made.dest, trust_remote_code=True, device="cpu").encode([" " * 500])


def test_the_dtype_is_that_of_the_file_and_overwrite_replaces_exports_alone(base: Path, tmp_path: Path, llmemb: Any) -> None:
    from safetensors import safe_open

    out, dest = trained(base, tmp_path / "out"), tmp_path / "dest"
    shown = llmemb("export-model", out, "--to", "merged", "--dest", dest)
    assert shown.code == 0, shown.err
    with safe_open(dest / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118 - no dict
    expected = Embedder.load(str(base), adapter=str(out / "adapter")).encode(SENTENCES)
    assert farthest(Embedder.load(str(dest)).encode(SENTENCES), expected) < 0.02, "bfloat16 keeps 8 bits"
    with pytest.raises(OutputError, match="overwrite"):
        exported(out, dest)
    exported(out, dest, overwrite=True)
    assert farthest(Embedder.load(str(dest)).encode(SENTENCES), expected) < 1e-5
    with pytest.raises(OutputError, match="no export wrote"):
        exported(out, out, overwrite=True)


def test_what_cannot_be_exported_is_named(base: Path, tmp_path: Path) -> None:
    out = trained(base, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither"):
        exported(tmp_path / "empty", tmp_path / "x")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    (out / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/away"}))
    with pytest.raises(ModelError, match="give base"):
        exported(out, tmp_path / "x")
    assert exported(out, tmp_path / "x", base=str(base)).base == str(base)
    wide = make_model(tmp_path / "wide", hidden_size=64)
    with pytest.raises(ModelError, match="does not fit"):
        exported(out, tmp_path / "y", base=str(wide))
    assert not list(tmp_path.glob("y*")), "nothing is left behind"
