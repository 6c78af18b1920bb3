"""STS: the pairs that are read, and the figure made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation import sts
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.suite import Texts

PAIRS = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186, "STS-B": 1379, "SICK-R": 4927, "STS-B-dev": 1500}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("edition", ["tokenized", "raw"])
def test_every_pair_with_a_gold_score_is_read(data: Path, name: str, edition: sts.Edition) -> None:
    task = sts.read(DataPlace(data), name, edition)
    (need,) = task.needs()
    assert isinstance(need, Texts)
    assert len(need.texts) == 2 * PAIRS[name]
    assert all(0 <= gold <= 5 for pairs in task.subsets.values() for gold in pairs.gold)


def test_both_editions_hold_the_same_pairs(data: Path) -> None:
    def letters(text: str) -> str:
        return "".join(sign for sign in text.lower() if sign.isalnum())

    for name in ("STS16", "STS-B"):
        tokenized, raw = (sts.read(DataPlace(data), name, edition) for edition in ("tokenized", "raw"))
        for subset, pairs in tokenized.subsets.items():
            other = raw.subsets[subset]
            assert np.array_equal(pairs.gold, other.gold)
            same = [letters(ours) == letters(theirs) for ours, theirs in zip(pairs.left, other.left, strict=True)]
            assert np.mean(same) > 0.9


def two_subsets() -> sts.StsTask:
    rng = np.random.default_rng(0)

    def pairs(count: int) -> sts.Pairs:
        return sts.Pairs(left=[f"l{n}" for n in range(count)], right=[f"r{n}" for n in range(count)], gold=rng.integers(0, 6, count).astype(float))

    return sts.StsTask(name="STS13", edition="tokenized", subsets={"a": pairs(7), "b": pairs(20)})


def test_subsets_are_laid_end_to_end_for_one_correlation() -> None:
    task = two_subsets()
    rng = np.random.default_rng(1)
    vector = {text: rng.normal(size=4).astype(np.float32) for pairs in task.subsets.values() for text in (*pairs.left, *pairs.right)}
    cosines: dict[str, list[float]] = {}
    for name, pairs in task.subsets.items():
        rows = [(vector[left], vector[right]) for left, right in zip(pairs.left, pairs.right, strict=True)]
        cosines[name] = [float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right))) for left, right in rows]
    (need,) = task.needs()
    score = task.score([np.stack([vector[text] for text in need.texts])])
    gold = [value for pairs in task.subsets.values() for value in pairs.gold]
    flat = [value for values in cosines.values() for value in values]
    assert score.main == pytest.approx(100 * spearmanr(flat, gold).statistic)
    assert score.parts["pearson"] == pytest.approx(100 * pearsonr(flat, gold).statistic)
    single = {name: 100 * spearmanr(cosines[name], task.subsets[name].gold).statistic for name in cosines}
    assert score.parts["subsets"] == pytest.approx(single)
    assert score.parts["mean"] == pytest.approx((single["a"] + single["b"]) / 2)
    assert score.parts["weighted_mean"] == pytest.approx((7 * single["a"] + 20 * single["b"]) / 27)


def test_a_vector_that_is_zero_or_not_finite_has_the_cosine_zero() -> None:
    left = np.array([[0, 0], [np.nan, 0], [1, 0]], np.float32)
    assert sts.cosine(left, np.ones((3, 2), np.float32)).tolist() == pytest.approx([0, 0, 2**-0.5])


def test_ranks_of_ties_are_their_mean() -> None:
    # By hand: ranks of the values 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert sts.spearman(np.array([0.1, 0.5, 0.5, 0.9]), np.array([1.0, 2, 3, 4])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_constant_cosines_tell_nothing() -> None:
    assert sts.spearman(np.ones(4), np.arange(4.0)) == 0


def benchmark(root: Path, lines: list[str]) -> DataPlace:
    path = root / "STSBenchmark" / "sts-dev.csv"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    return DataPlace(root)


def test_a_line_of_too_few_columns_is_named(tmp_path: Path) -> None:
    place = benchmark(tmp_path, ["g\tf\ty\t1\t4.0\ta man\ta boy", "g\tf\ty\t2\t4.0\ta man"])
    with pytest.raises(InputError, match=r"sts-dev\.csv line 2: 7 columns"):
        sts.read(place, "STS-B-dev")


def test_a_score_that_is_no_number_is_named(tmp_path: Path) -> None:
    place = benchmark(tmp_path, ["g\tf\ty\t1\tmany\ta man\ta boy"])
    with pytest.raises(InputError, match=r"sts-dev\.csv line 1: 'many' is no score"):
        sts.read(place, "STS-B-dev")


def test_a_sentence_without_words_is_named(tmp_path: Path) -> None:
    place = benchmark(tmp_path, ["g\tf\ty\t1\t4.0\ta man\ta boy", "g\tf\ty\t2\t4.0\t  \ta boy"])
    with pytest.raises(InputError, match=r"sts-dev\.csv line 2: a sentence without words"):
        sts.read(place, "STS-B-dev")
    (tmp_path / "STS13-en-test").mkdir()
    for subset in sts.SUBSETS["STS13"]:
        (tmp_path / "STS13-en-test" / f"STS.input.{subset}.txt").write_text("a\tb\n\t\nc\t \n")
        (tmp_path / "STS13-en-test" / f"STS.gs.{subset}.txt").write_text("1\n\n2\n")
    with pytest.raises(InputError, match=r"STS\.input\.FNWN\.txt line 3: a sentence without words"):
        sts.read(place, "STS13")


def test_data_that_are_missing_are_named_with_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"STS12 is not there: looked for .*SentEval.*--data or LLMEMB_DATA"):
        sts.read(DataPlace(tmp_path), "STS12")


def test_files_of_a_subset_must_be_of_one_length(tmp_path: Path) -> None:
    directory = tmp_path / "STS13-en-test"
    directory.mkdir()
    for subset in sts.SUBSETS["STS13"]:
        (directory / f"STS.input.{subset}.txt").write_text("a\tb\nc\td\n")
        (directory / f"STS.gs.{subset}.txt").write_text("1\n")
    with pytest.raises(InputError, match=r"has 2 lines and .* 1: they must be as many"):
        sts.read(DataPlace(tmp_path), "STS13")
