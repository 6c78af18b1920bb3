"""Semantic textual similarity: STS12–16, STS-B and SICK-R, by the protocol of both papers.

Invariant: a task's figure is Spearman's correlation of cosines with the gold scores over all its pairs, the subsets of
STS12–16 laid end to end ("all"; SentEval's own means over subsets stand in the parts). Two editions of the same pairs:
the lower-cased, tokenised files of SentEval, which paper 1 used, and the original ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation.data import SENTEVAL, DataPlace, read_lines
from llmemb_ray.evaluation.instructions import instruction
from llmemb_ray.evaluation.suite import Building, Floats, Need, Score, Suite, Task, Texts, choose

Edition = Literal["tokenized", "raw"]

SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
"""Those that SentEval holds: STS13 without SMT, which was never free."""

DEV = "STS-B-dev"
"""Chooses demonstrations and checkpoints; no part of the average."""

TASKS = (*SUBSETS, "STS-B", "SICK-R", DEV)

RAW = "the archives of SemEval (https://ixa2.si.ehu.eus/stswiki)"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """left, right: N sentences each; gold: float64 [N]"""

    left: list[str]
    right: list[str]
    gold: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class StsTask:
    """One task; ``subsets`` has one entry where the task has no subsets."""

    name: str
    edition: str
    subsets: dict[str, Pairs]

    def needs(self) -> list[Need]:
        texts = [text for pairs in self.subsets.values() for side in (pairs.left, pairs.right) for text in side]
        return [Texts(texts=texts, instruction=instruction(self.name, "STS"))]

    def score(self, embedded: list[Floats]) -> Score:
        cosines: dict[str, npt.NDArray[np.float64]] = {}
        start = 0
        for name, pairs in self.subsets.items():
            count = len(pairs.gold)
            cosines[name] = cosine(embedded[0][start : start + count], embedded[0][start + count : start + 2 * count])
            start += 2 * count
        gold = {name: pairs.gold for name, pairs in self.subsets.items()}
        everything = np.concatenate(list(cosines.values())), np.concatenate(list(gold.values()))
        parts: dict[str, Any] = {"text": self.edition, "pairs": len(everything[1]), "pearson": 100 * pearson(*everything)}
        if len(self.subsets) > 1:
            single = {name: 100 * spearman(cosines[name], gold[name]) for name in self.subsets}
            weights = [len(gold[name]) for name in self.subsets]
            parts |= {
                "subsets": single,
                "mean": float(np.mean(list(single.values()))),
                "weighted_mean": float(np.average(list(single.values()), weights=weights)),
            }
        return Score(main=100 * spearman(*everything), parts=parts)


def cosine(left_ND: Floats, right_ND: Floats) -> npt.NDArray[np.float64]:
    """float64 [N]: of row and row; 0 where one is zero or not finite, as SentEval does."""
    left, right = (np.nan_to_num(side.astype(np.float64), posinf=0.0, neginf=0.0) for side in (left_ND, right_ND))
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products: npt.NDArray[np.float64] = np.einsum("nd,nd->n", left, right)
    cosines: npt.NDArray[np.float64] = np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)
    return cosines


def spearman(values: npt.NDArray[np.float64], gold: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation, ties by mean rank; 0 where one side is constant, so that no order is told."""
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(values) == 0 or np.ptp(gold) == 0 else float(spearmanr(values, gold).statistic)


def pearson(values: npt.NDArray[np.float64], gold: npt.NDArray[np.float64]) -> float:
    from scipy.stats import pearsonr

    return 0.0 if np.ptp(values) == 0 or np.ptp(gold) == 0 else float(pearsonr(values, gold).statistic)


def read(data: DataPlace, name: str, edition: Edition = "tokenized") -> StsTask:
    """One task's pairs. Raises InputError naming the file and line that is missing or malformed."""
    return StsTask(name=name, edition=_edition(name, edition), subsets=_READERS[name](data, edition))


def _edition(name: str, edition: Edition) -> str:
    return edition if edition == "tokenized" or name != "SICK-R" else "raw (SICK has one edition)"


def _yearly(year: str, data: DataPlace, edition: Edition) -> dict[str, Pairs]:
    if edition == "tokenized":
        directory = data.find([f"{root}{year}-en-test" for root in ("senteval/downstream/STS/", "downstream/STS/", "STS/", "")], what=year, source=SENTEVAL)
    else:
        directory = data.find([f"sts_raw/{year}", f"{year}"], what=f"{year} (raw)", source=RAW)
    prefix = "STS2016" if (directory / f"STS2016.input.{SUBSETS[year][0]}.txt").exists() else "STS"
    return {name: _pairs(directory, prefix, name) for name in SUBSETS[year]}


def _pairs(directory: Path, prefix: str, name: str) -> Pairs:
    """The pairs of a subset that have a gold score."""
    texts, scores = directory / f"{prefix}.input.{name}.txt", directory / f"{prefix}.gs.{name}.txt"
    lines, gold = read_lines(texts, source=SENTEVAL), read_lines(scores, source=SENTEVAL)
    if len(lines) != len(gold):
        raise InputError(f"{texts} has {len(lines)} lines and {scores} {len(gold)}: they must be as many; get both files again")
    kept = [number for number, score in enumerate(gold, 1) if score.strip()]
    for number in kept:
        if len(lines[number - 1].split("\t")) < 2:
            raise InputError(f"{texts} line {number}: two sentences with a tab between them are wanted, found {lines[number - 1][:80]!r}")
    columns = [lines[number - 1].split("\t") for number in kept]
    numbers = [_number(gold[number - 1], scores, number) for number in kept]
    left, right = ([_words(parts[side], texts, number) for parts, number in zip(columns, kept, strict=True)] for side in (0, 1))
    return Pairs(left=left, right=right, gold=np.array(numbers))


def _benchmark(split: str, data: DataPlace, edition: Edition) -> dict[str, Pairs]:
    if edition == "tokenized":
        places, source = [f"{root}STSBenchmark" for root in ("senteval/downstream/STS/", "downstream/STS/", "STS/", "")], SENTEVAL
    else:
        places, source = ["sts_raw/STSBenchmark", "STSBenchmark"], RAW
    path = data.find(places, what=f"STS-B ({edition})", source=source) / f"sts-{split}.csv"
    return {"all": _table(path, read_lines(path, source=source), first=1, left=5, right=6, gold=4)}


def _sick(data: DataPlace, edition: Edition) -> dict[str, Pairs]:
    path = data.find([f"{root}SICK" for root in ("senteval/downstream/", "downstream/", "")], what="SICK", source=SENTEVAL) / "SICK_test_annotated.txt"
    return {"all": _table(path, read_lines(path, source=SENTEVAL)[1:], first=2, left=1, right=2, gold=3)}


def _table(path: Path, lines: list[str], *, first: int, left: int, right: int, gold: int) -> Pairs:
    """first: number of the first line in the file"""
    rows: list[list[str]] = []
    for number, line in enumerate(lines, first):
        parts = line.strip().split("\t")
        if len(parts) <= max(left, right, gold):
            raise InputError(f"{path} line {number}: {max(left, right, gold) + 1} columns with tabs between them are wanted, found {len(parts)}")
        rows.append(parts)
    return Pairs(
        left=[_words(parts[left], path, number) for number, parts in enumerate(rows, first)],
        right=[_words(parts[right], path, number) for number, parts in enumerate(rows, first)],
        gold=np.array([_number(parts[gold], path, number) for number, parts in enumerate(rows, first)]),
    )


def _words(text: str, path: Path, line: int) -> str:
    """The words with one blank between them, as SentEval's callers join them. Raises InputError if there are none."""
    words = " ".join(text.split())
    if not words:
        raise InputError(f"{path} line {line}: a sentence without words, of which no vector can be made; take the pair out")
    return words


def _number(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{path} line {line}: {text!r} is no score") from None


_READERS: dict[str, Callable[[DataPlace, Edition], dict[str, Pairs]]] = {
    **{year: partial(_yearly, year) for year in SUBSETS},
    "STS-B": partial(_benchmark, "test"),
    "SICK-R": _sick,
    DEV: partial(_benchmark, "dev"),
}


def _build(edition: Edition, suite: str, building: Building) -> list[Task]:
    return [read(building.data, name, edition) for name in choose(building.wanted, TASKS, suite)]


SUITE = Suite(name="sts", title="STS, SentEval's lower-cased and tokenised files", build=partial(_build, "tokenized", "sts"), apart=(DEV,))
RAW_SUITE = Suite(name="sts-raw", title="STS, original case and punctuation", build=partial(_build, "raw", "sts-raw"), apart=(DEV,))
