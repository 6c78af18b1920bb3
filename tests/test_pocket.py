"""The embedded model: small, whole, as its card says, and as good as its card says on a check that is at hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.embedders.models import POCKET_PATH
from llmemb_ray.evaluation import sts
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.suite import Texts

MOST_BYTES = 12_000_000

FILES = {"README.md", "config.json", "llmemb.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def pocket() -> Embedder:
    return Embedder.load("pocket", device="cpu")


def test_it_is_whole_and_small() -> None:
    files = {path.name: path.stat().st_size for path in POCKET_PATH.iterdir()}
    assert set(files) == FILES
    assert sum(files.values()) <= MOST_BYTES
    with safe_open(POCKET_PATH / "model.safetensors", framework="numpy") as weights:
        assert {str(weights.get_tensor(name).dtype) for name in weights.keys()} == {"float16"}  # noqa: SIM118


def test_a_text_means_the_same_however_it_is_tokenised(pocket: Embedder) -> None:
    """SentEval's editions set blanks before marks and have no capitals."""
    raw, tokenized, other = pocket.encode(["A woman, in red, is dancing.", "a woman , in red , is dancing .", "The price of oil fell sharply."])
    assert raw @ tokenized == pytest.approx(1, abs=1e-5)
    assert raw @ other < 0.3


def test_meaning_without_a_shared_word(pocket: Embedder) -> None:
    words = pocket.encode(["a physician treats his patients", "doctors healing sick people", "banks lending stolen cars"])
    assert words[0] @ words[1] > words[0] @ words[2] + 0.2


def test_any_text_has_a_vector(pocket: Embedder) -> None:
    vectors = pocket.encode(["日本語 🎉", "x" * 100_000, "\x00\ufffd"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_score_on_its_card(pocket: Embedder, data: Path) -> None:
    """STS-B dev by the code of the evaluation. The card's figure is of cleaned text, which the tokenizer levels."""
    task = sts.read(DataPlace.of(str(data)), sts.DEV)
    (need,) = task.needs()
    assert isinstance(need, Texts)
    found = task.score([pocket.encode(list(need.texts))]).main
    card = (POCKET_PATH / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"(?m)^\| mean \|.*$", card)
    assert found == pytest.approx(float(line.split("|")[-2]), abs=0.3)
    assert found > 80


def test_the_card_says_what_the_configuration_says() -> None:
    card = (POCKET_PATH / "README.md").read_text(encoding="utf-8")
    config = json.loads((POCKET_PATH / "config.json").read_text())
    assert f"{config['num_hidden_layers']} layers × {config['hidden_size']}" in card
    assert f"{config['vocab_size']:,} tokens" in card
    for said in ("distilled", "CC BY-SA 4.0", "all-MiniLM-L6-v2", "Apache-2.0"):
        assert said in card
