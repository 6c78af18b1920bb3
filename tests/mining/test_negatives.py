"""Which of the rows found are hard negatives, by scores made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmemb_ray.config import MineSettings
from llmemb_ray.errors import ConfigError
from llmemb_ray.mining.negatives import MARGIN, MAX_SCORE, MIN_SCORE, POSITIVE, QUERY, RANK, RELATIVE, Eligible, Rules, eligible, preference

SCORES = np.array([0.95, 0.9, 0.8, 0.75, 0.5, 0.25, -0.5])
"""Place 0 has the query's own text, place 2 that of a positive, which scores 0.8."""


def judged(**rules: Any) -> Eligible:
    own, positives = np.zeros(7, np.bool_), np.zeros(7, np.bool_)
    own[0] = positives[2] = True
    return eligible(SCORES, own_K=own, positives_K=positives, positive_score=0.8, rules=Rules(**rules))


@pytest.mark.parametrize(
    ("rules", "places", "removed"),
    [
        ({}, [1, 3, 4, 5, 6], {}),
        ({"rank_from": 2, "rank_to": 4}, [3, 4, 5], {RANK: 2}),
        ({"max_score": 0.75}, [3, 4, 5, 6], {MAX_SCORE: 1}),
        ({"min_score": 0.25}, [1, 3, 4, 5], {MIN_SCORE: 1}),
        ({"margin": 0.3}, [4, 5, 6], {MARGIN: 2}),
        ({"relative_margin": 0.0625}, [3, 4, 5, 6], {RELATIVE: 1}),
        ({"relative_margin": 0.5}, [5, 6], {RELATIVE: 3}),
        ({"rank_from": 2, "max_score": 0.6, "margin": 0.5}, [5, 6], {RANK: 1, MAX_SCORE: 1, MARGIN: 1}),
        ({"max_score": -1.0}, [], {MAX_SCORE: 5}),
    ],
)
def test_each_rule_leaves_what_it_says_and_counts_the_rest(rules: dict[str, Any], places: list[int], removed: dict[str, int]) -> None:
    found = judged(**rules)
    assert found.places.tolist() == places
    assert found.removed == {QUERY: 1, POSITIVE: 1} | removed
    assert found.ranks.tolist() == [0, 1, 0, 2, 3, 4, 5]


def test_a_relative_margin_lies_below_a_positive_of_negative_score() -> None:
    none = np.zeros(3, np.bool_)
    found = eligible(np.array([-0.3, -0.45, -0.7]), own_K=none, positives_K=none, positive_score=-0.4, rules=Rules(relative_margin=0.5))
    assert found.places.tolist() == [2]


def test_the_draw_of_a_row_is_its_own() -> None:
    places = np.arange(20)
    assert preference(places, Rules(), row=(0, 5, 0)).tolist() == list(range(20))
    drawn = {row: tuple(preference(places, Rules(sample="random", seed=3), row=(0, row, 0))) for row in range(50)}
    assert len(set(drawn.values())) == 50
    assert all(sorted(one) == list(range(20)) for one in drawn.values())
    assert tuple(preference(places, Rules(sample="random", seed=3), row=(0, 7, 0))) == drawn[7]
    assert tuple(preference(places, Rules(sample="random", seed=4), row=(0, 7, 0))) != drawn[7]
    first = np.bincount([one[0] for one in drawn.values()], minlength=20)
    assert first.max() <= 10  # 2.5 on average.


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"corpus": []}, "corpus: give either"),
        ({"corpus_run": "run"}, "corpus: give either"),
        ({"rank_to": 200}, "rank_to: 200 is more than the 100"),
        ({"rank_from": 101}, "rank_from: 101 lies behind"),
        ({"rank_from": 91, "negatives": 11}, "negatives: 11 do not fit among ranks 91 to 100"),
        ({"role": "query"}, "role: queries are embedded as queries"),
        ({"symmetric": True}, "symmetric: does nothing without an instruction"),
        ({"qrels": "q.tsv", "positive_column": "p"}, "exclude each other"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MineSettings.make({"model": "m", "queries": ["q.jsonl"], "corpus": ["c"], "out": "o"} | values)
