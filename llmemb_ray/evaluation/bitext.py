"""Bitext: each Tatoeba sentence in one of 112 languages is to find its translation among that language's English sentences.

Invariant: line i of a language's file and line i of its English file are translations, so a sentence is right if, of all sentences
on the other side, that on its own line is nearest by cosine. Files of unequal length are refused, never cut to the shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmemb_ray.errors import InputError
from llmemb_ray.evaluation.data import read_lines
from llmemb_ray.evaluation.instructions import instruction
from llmemb_ray.evaluation.suite import Building, Floats, Need, Score, Suite, Task, Texts, choose

ENGLISH = "eng"

SOURCE = "LASER (https://github.com/facebookresearch/LASER, data/tatoeba/v1)"


@dataclass(frozen=True, kw_only=True)
class BitextTask:
    """One language; ``foreign`` and ``english`` are N sentences each, translations by their places."""

    name: str
    """ISO 639-3 code."""
    foreign: list[str]
    english: list[str]

    def needs(self) -> list[Need]:
        wanted = instruction("Tatoeba", "BitextMining")
        return [Texts(texts=self.foreign, instruction=wanted), Texts(texts=self.english, instruction=wanted)]

    def score(self, embedded: list[Floats]) -> Score:
        to_english, from_english = nearest(*embedded)
        return Score(
            main=accuracy(to_english),
            parts={
                "f1": f1(to_english),
                "from_english": accuracy(from_english),
                "from_english_f1": f1(from_english),
                "rows": len(self.foreign),
            },
        )


def nearest(left_ND: Floats, right_ND: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """int64 [N] each: for every row of the left the nearest of the right by cosine, and the other way round.

    Of equally near ones the first; zero vectors have cosine 0 with all.
    """
    cosines = unit(left_ND) @ unit(right_ND).T
    return cosines.argmax(axis=1), cosines.argmax(axis=0)


def unit(vectors_ND: Floats) -> npt.NDArray[np.float64]:
    """float64 [N, D]: divided by their norms; zero where a vector is zero or not finite."""
    vectors = vectors_ND.astype(np.float64)
    vectors[~np.isfinite(vectors).all(axis=1)] = 0
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    divided: npt.NDArray[np.float64] = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return divided


def accuracy(nearest_N: npt.NDArray[np.int64]) -> float:
    """Share of queries × 100 whose nearest is the row of their own number."""
    return 100 * float(np.mean(nearest_N == np.arange(len(nearest_N))))


def f1(nearest_N: npt.NDArray[np.int64]) -> float:
    """F1 × 100 as MTEB reports it for bitext: each row a class that is right once, F1 of each class, their mean.

    A class that was found, and was named p times in all, has precision 1/p and recall 1: its F1 is 2 / (1 + p). The others have 0.
    """
    named = np.bincount(nearest_N, minlength=len(nearest_N))
    found = nearest_N == np.arange(len(nearest_N))
    return 100 * float(np.mean(np.where(found, 2 / (1 + named), 0)))


def build(building: Building) -> list[Task]:
    """The wanted languages. Raises ConfigError for one that does not exist, InputError for files that are missing or do not match."""
    place = building.data.find(("tatoeba", "."), what="Tatoeba", source=SOURCE)
    codes = sorted({code for file in place.glob(f"tatoeba.*-{ENGLISH}.*") if (code := file.name.split(".")[1].removesuffix(f"-{ENGLISH}"))})
    if not codes:
        raise InputError(f"Tatoeba is not there: {place} holds no tatoeba.xxx-{ENGLISH}.xxx. Get it from {SOURCE}, and name its directory with --data")
    return [read(place, code) for code in choose(building.wanted, codes, "bitext")]


def read(place: Path, code: str) -> BitextTask:
    """One language's pairs. Raises InputError naming the file."""
    files = [place / f"tatoeba.{code}-{ENGLISH}.{side}" for side in (code, ENGLISH)]
    foreign, english = (read_lines(file, source=SOURCE) for file in files)
    if len(foreign) != len(english):
        raise InputError(f"{files[0]} has {len(foreign)} lines, {files[1]} has {len(english)}: they must be translations line by line; get both from {SOURCE}")
    for file, lines in zip(files, (foreign, english), strict=True):
        if not lines:
            raise InputError(f"{file} is empty; get it from {SOURCE}")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise InputError(f"{file} line {number} is empty, its pair has no score; get the file from {SOURCE}")
    return BitextTask(name=code, foreign=foreign, english=english)


SUITE = Suite(name="bitext", title="Tatoeba, 112 languages and English: the translation is the nearest sentence", build=build)
