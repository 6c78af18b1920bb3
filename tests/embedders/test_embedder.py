"""From texts to vectors in one call: every template and cleaning, real text, and no Ray anywhere."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmemb_ray.embedders import Embedder
from llmemb_ray.errors import ConfigError, InputError, ModelError
from llmemb_ray.representation import templates
from tests.small_models import SENTENCES, make_model

FP32_BOUND = 1e-5
INSTRUCTION = "Retrieve semantically similar text."


@cache
def plain_model(directory: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval(), AutoTokenizer.from_pretrained(directory)


def one_by_one(directory: Path, prompts: list[str], *, eos: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Normalised last states of whole prompts, each tokenised and computed alone by transformers."""
    model, tokenizer = plain_model(directory)
    vectors = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"] + ([tokenizer.eos_token_id] if eos else [])
        with torch.no_grad():
            vectors.append(model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].numpy())
    stacked = np.stack(vectors)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def cleaned(text: str) -> str:
    text = text if text[-1] in ".?\"'" else text + "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text[-1] == "?" else text


SHOT = 'This sentence : "A jockey riding a horse." means in one word:"Equestrian".'
CASES: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "prompteol": ({}, lambda s: f'This sentence : "{s}" means in one word:"', False),
    "prompteol-icl": (
        {"prompt": "prompteol-icl", "demo": ["A jockey riding a horse.=>Equestrian"]},
        lambda s: f'{SHOT}This sentence : "{s}" means in one word:"',
        False,
    ),
    "e5": ({"prompt": "e5", "instruction": INSTRUCTION}, lambda s: f"Instruct: {INSTRUCTION}\nQuery: {s}", True),
    "none": ({"prompt": "none"}, lambda s: s, False),
    "own": ({"prompt": 'say "{text}"'}, lambda s: f'say "{s}"', False),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, real_models: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embedders")
    return {"TinyStories-656K": real_models / "TinyStories-656K", **{kind: make_model(root / kind, kind, head=True) for kind in ("opt", "mistral")}}


@pytest.mark.parametrize("clean", ["none", "senteval"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["TinyStories-656K", "opt", "mistral"])
def test_every_template_and_cleaning(kind: str, case: str, clean: str, directories: dict[str, Path]) -> None:
    options, prompt, eos = CASES[case]
    texts = [text for text in SENTENCES if kind != "TinyStories-656K" or text.isascii()] * 2
    vectors = Embedder.load(str(directories[kind]), device="cpu", clean=clean, **options).encode(texts)
    prompts = [prompt(cleaned(text)).strip() if clean == "senteval" else prompt(text) for text in texts]
    assert vectors.dtype == np.float32
    assert np.abs(vectors - one_by_one(directories[kind], prompts, eos=eos)).max() <= FP32_BOUND


def test_a_role_has_its_own_prompt(directories: dict[str, Path]) -> None:
    embedder = Embedder.load(str(directories["opt"]), device="cpu", prompt="e5", instruction=INSTRUCTION, role="query")
    text = "A man is playing a guitar."
    assert np.abs(embedder.encode([text], "document") - one_by_one(directories["opt"], [text], eos=True)).max() <= FP32_BOUND
    query = one_by_one(directories["opt"], [f"Instruct: {INSTRUCTION}\nQuery: {text}"], eos=True)
    assert np.abs(embedder.encode([text], "query") - query).max() <= FP32_BOUND


def test_dimensions_are_cut_before_normalising(directories: dict[str, Path]) -> None:
    load: dict[str, Any] = {"device": "cpu"}
    whole = Embedder.load(str(directories["opt"]), normalize=False, **load).encode(SENTENCES)
    cut = Embedder.load(str(directories["opt"]), dimensions=5, **load)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    assert cut.dimension == 5
    assert np.abs(cut.encode(SENTENCES) - expected).max() <= FP32_BOUND
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).min() > 0.1


def test_a_long_text_is_cut_to_the_model_s_positions(directories: dict[str, Path]) -> None:
    embedder = Embedder.load(str(directories["opt"]), device="cpu")
    assert embedder.representation.max_tokens == 256
    vectors = embedder.encode(["A man is playing a guitar. " * 300, "A man is playing a guitar."])
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < FP32_BOUND


def test_real_text_has_hardly_any_padding(data: Path, directories: dict[str, Path]) -> None:
    with open(data / "sts_raw" / "STSBenchmark" / "sts-dev.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = [row[column] for row in rows for column in (5, 6)]
    assert len(texts) == 3000
    for kind, options in (("TinyStories-656K", {}), ("mistral", {"prompt": "none"})):
        work = Embedder.load(str(directories[kind]), device="cpu", **options).encode_rows(texts[:1000]).work
        assert work.padding / work.computed < 0.03


def test_padded_architectures_hardly_pad_either(data: Path, tmp_path: Path) -> None:
    """Rows of nearly one length go together; a batch in the corpus's own order would be about a third padding."""
    with open(data / "sts_raw" / "STSBenchmark" / "sts-dev.csv", encoding="utf-8") as file:
        texts = [row[5] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    embedder = Embedder.load(str(make_model(tmp_path / "bloom", "bloom")), device="cpu", token_budget=1024)
    assert embedder.backend.mode == "padded"
    work = embedder.encode_rows(texts).work
    assert 0 < work.padding / work.computed < 0.03


def test_a_text_that_cannot_be_embedded_is_named(tmp_path: Path) -> None:
    from tests.small_models import tokenizer_of

    directory = make_model(tmp_path / "no-bos", tokenizer=tokenizer_of(bos=None))
    embedder = Embedder.load(str(directory), device="cpu", prompt="none")
    with pytest.raises(InputError, match="text 1: "):
        embedder.encode(["a", "", "b"])
    embedded = embedder.encode_rows(["a", "", "b"])
    assert list(embedded.failed) == [1]
    assert not embedded.vectors[1].any()
    assert np.abs(embedded.vectors[[0, 2]] - embedder.encode(["a", "b"])).max() <= FP32_BOUND


def test_no_texts(directories: dict[str, Path]) -> None:
    assert Embedder.load(str(directories["opt"]), device="cpu").encode([]).shape == (0, 32)


def test_settings_are_checked_against_the_model_before_it_is_loaded(directories: dict[str, Path], tmp_path: Path) -> None:
    without_weights = make_model(tmp_path / "light", "llama")
    (without_weights / "model.safetensors").unlink()
    for options, complaint in (
        ({"layer": 3}, "layer"),
        ({"dimensions": 33}, "dimensions"),
        ({"max_tokens": 257}, "max_tokens"),
        ({"max_tokens": 3}, "template"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Embedder.load(str(without_weights), **options)
    with pytest.raises(ModelError, match="safetensors"):
        Embedder.load(str(without_weights))
    with pytest.raises(ConfigError, match="no such setting"):
        Embedder.load(str(directories["opt"]), poolling="mean")


def test_threads_take_turns(directories: dict[str, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    embedder = Embedder.load(str(directories["mistral"]), device="cpu", prompt="prompteol")
    alone = embedder.encode(SENTENCES)
    with ThreadPoolExecutor(4) as pool:
        for vectors in pool.map(embedder.encode, [SENTENCES] * 12):
            assert np.abs(vectors - alone).max() <= FP32_BOUND


def run(code: str, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encode_works_where_ray_cannot_be_imported(directories: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from llmemb_ray.embedders import Embedder\n"
        "print(*Embedder.load(sys.argv[1], device='cpu').encode(['A man is smoking.'])[0].tolist())"
    )
    vector = np.array(run(code, str(directories["opt"])).split(), np.float32)
    prompt = templates.PROMPTEOL.format(text="A man is smoking.")
    assert np.abs(vector - one_by_one(directories["opt"], [prompt])[0]).max() <= FP32_BOUND


def test_importing_brings_neither_ray_nor_torch() -> None:
    """Command line and driver import these packages to plan; the heavy libraries come when a model does."""
    code = (
        "import sys, llmemb_ray.representation, llmemb_ray.embedders, llmemb_ray.embedders.models\n"
        "print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert run(code).strip() == "[]"
