"""Scores on disk are read back as they were, those of another search refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmemb_ray.demonstrations.leaderboard import Leaderboard
from llmemb_ray.demonstrations.scoring import Outcome, Trial
from llmemb_ray.errors import InputError, RunMismatch
from llmemb_ray.representation import Demonstration
from llmemb_ray.storage import Storage

DEER, HORSE, FAULTY = ((Demonstration(sentence, word),) for sentence, word in [("meat from a deer.", "Venison"), ('"Ride" 数据', "Horse"), ("x", "Y")])


def board(directory: Path, seed: int = 1) -> Leaderboard:
    return Leaderboard(Storage(str(directory)), size=10, seed=seed)


def test_scores_are_read_back(tmp_path: Path) -> None:
    first = board(tmp_path)
    first.add(Trial((), 10), Outcome(score=30.0))
    first.add(Trial(DEER, 10), Outcome(score=20.0, seconds=1.5, tokens=7, computed=5, retokenized=2))
    first.add(Trial(HORSE, 10), Outcome(score=45.0))
    first.add(Trial(FAULTY, 10), Outcome(score=None, problem="does not fit"))
    again = board(tmp_path)
    assert len(again) == 4
    assert again.outcome(DEER, 10) == Outcome(score=20.0, seconds=1.5, tokens=7, computed=5, retokenized=2)
    places = again.ranking([FAULTY, DEER, HORSE, DEER])
    assert [(place.rank, place.demonstrations, place.gain) for place in places] == [(1, HORSE, 15.0), (2, DEER, -10.0), (None, FAULTY, None)]
    again.write(places)
    lines = [json.loads(line) for line in (tmp_path / "leaderboard.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["score"] for line in lines] == [45.0, 20.0, None]
    assert lines[0]["demonstrations"] == [{"sentence": '"Ride" 数据', "word": "Horse"}]


def test_scores_on_samples_belong_to_their_seed_and_those_on_everything_to_all(tmp_path: Path) -> None:
    first = board(tmp_path, seed=1)
    first.add(Trial(DEER, 5), Outcome(score=1.0))
    first.add(Trial(DEER, 10), Outcome(score=2.0))
    other = board(tmp_path, seed=2)
    assert other.get(Trial(DEER, 5)) is None
    assert other.outcome(DEER, 10).score == 2.0
    other.add(Trial(DEER, 5), Outcome(score=3.0))
    assert board(tmp_path, seed=1).outcome(DEER, 5).score == 1.0
    assert board(tmp_path, seed=2).outcome(DEER, 5).score == 3.0


def test_prompts_are_told_apart_by_the_order_of_their_demonstrations(tmp_path: Path) -> None:
    both = board(tmp_path)
    both.add(Trial(DEER + HORSE, 10), Outcome(score=1.0))
    both.add(Trial(HORSE + DEER, 10), Outcome(score=2.0))
    assert board(tmp_path).outcome(DEER + HORSE, 10).score == 1.0


def test_another_search_is_refused_with_what_differs(tmp_path: Path) -> None:
    identity = {"exam": {"name": "STS-B dev", "size": 10}, "space": {"model": "sha256:1"}}
    assert not board(tmp_path).check(identity, {})
    board(tmp_path).claim(identity, {"compute_dtype": "float32", "quantization": "none"})
    assert board(tmp_path).check(identity, {})
    assert board(tmp_path).check(identity, {"quantization": "none"})
    with pytest.raises(RunMismatch, match=r"(?s)name another directory with out.*space.model: this search 'sha256:2', the directory 'sha256:1'"):
        board(tmp_path).check(identity | {"space": {"model": "sha256:2"}}, {})
    with pytest.raises(RunMismatch, match=r"engine.compute_dtype: this search 'bfloat16', the directory 'float32'"):
        board(tmp_path).claim(identity, {"compute_dtype": "bfloat16", "quantization": "none"})


@pytest.mark.parametrize("text", ["{", "[]", '{"size": 3}', '{"demonstrations": [{"wort": "x"}], "size": 1, "seed": 1, "score": 1}'])
def test_a_file_that_is_no_score_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "abc.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"scores/abc\.json is no score"):
        board(tmp_path)


def test_what_an_interrupted_write_left_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "abc.json.tmp-0123456789ab").write_text("{", encoding="utf-8")
    assert len(board(tmp_path)) == 0
