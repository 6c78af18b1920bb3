"""Successive halving over scores that are known beforehand."""

from __future__ import annotations

import pytest
from scipy.stats import kendalltau, spearmanr

from llmemb_ray.demonstrations.halving import agreement, halve, rank, sizes

FULL = {"a": 50.0, "b": 40.0, "c": 60.0, "d": 30.0, "e": 20.0, "f": None}


def scores_of(table: dict[int, dict[str, float | None]]):  # type: ignore[no-untyped-def]
    asked: list[tuple[list[str], int]] = []

    def score(candidates, size):  # type: ignore[no-untyped-def]
        asked.append((list(candidates), size))
        return {candidate: table[size][candidate] for candidate in candidates}

    return score, asked


@pytest.mark.parametrize(
    ("size", "first", "expected"), [(1500, 8, [188, 375, 750, 1500]), (16, 4, [4, 8, 16]), (3, 8, [1, 2, 3]), (1, 2, [1]), (1000, 3, [250, 500, 1000])]
)
def test_samples_double_until_they_are_everything(size: int, first: int, expected: list[int]) -> None:
    assert sizes(size, first) == expected


def test_the_worse_half_is_dropped_and_so_is_what_cannot_be_scored() -> None:
    score, asked = scores_of({2: {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0, "e": 1.0, "f": None}, 4: FULL, 8: FULL})
    rounds = halve("abcdef", 8, first=4, score=score)
    assert asked == [(list("abcdef"), 2), (list("abc"), 4), (list("ca"), 8)]
    assert [step.ranked for step in rounds] == [list("abcdef"), list("cab"), list("ca")]


def test_a_candidate_without_a_score_is_last_and_takes_no_place() -> None:
    score, asked = scores_of({1: {"x": None, "y": None, "z": 1.0}, 2: {"z": 2.0}})
    assert halve("xyz", 2, first=2, score=score)[-1].ranked == ["z"]
    assert asked[1] == (["z"], 2)


def test_equal_scores_keep_their_order() -> None:
    assert rank("cab", {"a": 1.0, "b": None, "c": 1.0}) == ["c", "a", "b"]


def test_agreement_with_a_winner_that_was_dropped() -> None:
    """On the sample c, the best on everything, is only fourth: halving ends with a, the second."""
    first: dict[str, float | None] = {"a": 9.0, "b": 8.0, "d": 7.0, "c": 6.0, "e": 5.0, "f": None}
    score, _ = scores_of({4: first, 8: FULL})
    found = agreement(halve("abcdef", 8, first=2, score=score), FULL)
    assert found is not None
    assert (found.same_winner, found.winner_rank, found.difference) == (False, 2, 10.0)
    assert (found.kept_of_best, found.best) == (2, 3)  # Of c, a, b.
    assert found.work == (6 * 4 + 3 * 8) / (6 * 8)
    ours, theirs = [9.0, 8.0, 7.0, 6.0, 5.0], [50.0, 40.0, 30.0, 60.0, 20.0]
    assert found.correlations[0] == {
        "items": 4,
        "candidates": 6,
        "spearman": pytest.approx(spearmanr(ours, theirs).statistic),
        "kendall": pytest.approx(kendalltau(ours, theirs).statistic),
    }


def test_no_agreement_without_the_full_search() -> None:
    score, _ = scores_of({4: FULL, 8: FULL})
    rounds = halve("abcdef", 8, first=2, score=score)
    assert agreement(rounds, {key: value for key, value in FULL.items() if key != "e"}) is None
    assert agreement(rounds, FULL).same_winner  # type: ignore[union-attr]
