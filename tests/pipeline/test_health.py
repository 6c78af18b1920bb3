"""The health gate: vectors that are not finite fail the run, a broken model stops it early, collapsed vectors are warned of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmemb_ray.errors import UnhealthyVectors
from llmemb_ray.pipeline.attempt import mean_cosine
from tests.small_jobs import embed, opened, problems_of, vectors_by_text_id, write
from tests.small_models import SENTENCES, make_damaged_model


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A model that makes NaN of every text with a # in it."""
    return make_damaged_model(tmp_path / "damaged")


def test_one_vector_that_is_not_finite_fails_a_finished_run_until_it_is_allowed(damaged: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", ["good", "bad #", "fine"], id=[1, 2, 3])
    with pytest.raises(UnhealthyVectors, match=r"1 rows have a vector that is not finite \(allowed 0\); .*/rejects with reason not_finite"):
        embed(corpus, tmp_path / "out", damaged, prompt="none")
    assert opened(tmp_path / "out").receipt is not None
    before = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    receipt = embed(corpus, tmp_path / "out", damaged, prompt="none", max_nan=1)
    assert receipt.rejects_by_reason == {"not_finite": 1}
    assert {path.name for path in (tmp_path / "out" / "data").iterdir()} == before, "nothing is embedded again"
    assert problems_of(tmp_path / "out", corpus) == []


def test_a_model_that_is_broken_through_and_through_stops_before_the_corpus_is_done(damaged: Path, tmp_path: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", [f"text # {row}" for row in range(2000)], row_group_size=100)
    with pytest.raises(
        UnhealthyVectors, match=r"of \d+ rows have a vector that is not finite: the model does not work as it is loaded. Try another compute_dtype"
    ):
        embed(corpus, tmp_path / "out", damaged, prompt="none", rows_per_unit=100)
    assert len(opened(tmp_path / "out").commits) < 5, "of 20 units"


def test_collapsed_vectors_are_warned_of_and_others_are_not(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Layer 0 with last pooling of PromptEOL is the embedding of the template's last token: the same for every text."""
    corpus = write(tmp_path / "in" / "a.parquet", SENTENCES[:10], id=list(range(10)))
    receipt = embed(corpus, tmp_path / "same", model, layer=0, quiet=False)
    assert receipt.mean_cosine == pytest.approx(1.0, abs=1e-5)
    assert "warning: the vectors are nearly all alike (mean cosine of pairs 1.000)" in capfd.readouterr().err
    embed(corpus, tmp_path / "other", model, prompt="none", pooling="mean", quiet=False)
    assert "nearly all alike" not in capfd.readouterr().err


def test_the_mean_cosine_is_that_of_all_pairs(tmp_path: Path, model: Path) -> None:
    corpus = write(tmp_path / "in" / "a.parquet", SENTENCES, id=list(range(len(SENTENCES))))
    receipt = embed(corpus, tmp_path / "out", model)
    vectors = np.stack(list(vectors_by_text_id(tmp_path / "out").values()))
    pairs = [float(a @ b) for i, a in enumerate(vectors) for b in vectors[i + 1 :]]
    assert receipt.mean_cosine == pytest.approx(np.mean(pairs), abs=1e-5)


@pytest.mark.parametrize("make", [lambda: np.zeros((0, 4)), lambda: np.ones((1, 4))])
def test_of_fewer_than_two_vectors_there_is_no_pair(make: Callable[[], np.ndarray]) -> None:
    assert mean_cosine(make().astype(np.float32)) == 0.0
