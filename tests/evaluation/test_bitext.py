"""Translations are found by cosine, counted as MTEB counts them, and files that do not match are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation.bitext import SUITE, BitextTask, f1, nearest
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.suite import Building, Task


def build(root: Path, *wanted: str) -> list[Task]:
    settings = EvaluateSettings.make({"model": "m", "suite": ["bitext"]})
    return SUITE.build(Building(settings=settings, data=DataPlace(root), spec=None, wanted=wanted, scratch="", on_cluster=False))


def test_each_sentence_looks_for_its_own_line_by_cosine() -> None:
    foreign = np.array([[9, 0], [1, 1], [0, 2]], np.float32)
    english = np.array([[1, 0.1], [100, 0], [0, 1]], np.float32)
    # Angles of foreign: 0, 45, 90 degrees; of English: 5.7, 0, 90.
    assert [rows.tolist() for rows in nearest(foreign, english)] == [[1, 0, 2], [0, 0, 2]]
    score = BitextTask(name="xxx", foreign=["a", "b", "c"], english=["d", "e", "f"]).score([foreign, english])
    assert score.main == pytest.approx(100 / 3)
    # To English, only row 2 is right, and named once: F1 (0 + 0 + 1) / 3. From English row 0 is right and named twice, row 2 is right: (2/3 + 0 + 1) / 3.
    assert score.parts == pytest.approx({"f1": 100 / 3, "from_english": 200 / 3, "from_english_f1": 500 / 9, "rows": 3})


def test_of_equally_near_sentences_the_first_is_taken() -> None:
    same = np.array([[1, 2, 3], [2, 4, 6], [0, 0, 0]], np.float32)
    assert [rows.tolist() for rows in nearest(same, same)] == [[0, 0, 0]] * 2


def test_f1_and_accuracy_are_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    english = random.standard_normal((300, 5)).astype(np.float32)
    foreign = (english + 0.6 * random.standard_normal(english.shape)).astype(np.float32)
    (found, _), rows = nearest(foreign, english), np.arange(300)
    score = BitextTask(name="xxx", foreign=[""] * 300, english=[""] * 300).score([foreign, english])
    assert 10 < score.main < 90
    assert score.main == pytest.approx(100 * accuracy_score(rows, found))
    assert f1(found) == pytest.approx(100 * f1_score(rows, found, average="weighted", zero_division=0))


def test_tatoeba_is_a_task_for_each_language(data: Path) -> None:
    tasks = {task.name: task for task in build(data)}
    assert len(tasks) == 112
    foreign, english = tasks["deu"].needs()
    assert len(foreign.texts) == len(english.texts) == 1000  # type: ignore[union-attr]
    assert (foreign.role, foreign.instruction) == (english.role, english.instruction) == ("document", "Retrieve parallel sentences.")
    assert [task.name for task in build(data / "tatoeba", "FRA", "deu")] == ["deu", "fra"]
    with pytest.raises(ConfigError, match=r"no task 'deus'; nearest: .*deu"):
        build(data, "deus")


def test_files_that_are_missing_or_do_not_match_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no tatoeba\.xxx-eng\.xxx.*LASER"):
        build(tmp_path)
    foreign, english = (tmp_path / f"tatoeba.deu-eng.{side}" for side in ("deu", "eng"))
    foreign.write_text("Ja.\nNein.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"tatoeba\.deu-eng\.eng is not there; get it from LASER"):
        build(tmp_path)
    english.write_text("Yes.\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"deu-eng\.deu has 2 lines, .*deu-eng\.eng has 1"):
        build(tmp_path)
    english.write_text("Yes.\n \n", encoding="utf-8")
    with pytest.raises(InputError, match=r"deu-eng\.eng line 2 is empty"):
        build(tmp_path)
