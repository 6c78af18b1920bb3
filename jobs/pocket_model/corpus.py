"""The corpus of the embedded model: all origins and recombinations together, distinct, shuffled, evaluation sentences taken out last.

Invariant: no text of the corpus equals, ignoring case and white space, a text of an evaluation that the project has, a demonstration, or a query of
benchmarks/pocket.py. Counts are those of texts that stay; what was taken out is counted too.
"""

from __future__ import annotations

import json
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.evaluation.contamination import normal
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.evaluate import suite_of
from llmemb_ray.evaluation.suite import Building, Texts
from pocket_model import recombine, texts
from pocket_model.questions import collection

SUITES = ("sts", "sts-raw", "transfer", "retrieval", "bitext")
CAPTIONS, NEWS = 40_000, 20_000
COMMON = 8
"""Occurrences in the corpus of a common noun that a news line may use."""


def roots(unpacked: Path, data: Path) -> dict[str, Path]:
    """Directory of each origin's files."""
    own = {"snli": data / "snli", "python-docstrings": Path(sysconfig.get_path("stdlib"))}
    return {origin.name: own.get(origin.name, unpacked / (origin.package or ".")) for origin in texts.ORIGINS}


def make(out: Path, unpacked: Path, data: Path) -> dict[str, object]:
    """Writes ``out`` (columns text, origin) and returns its accounts, which also stand beside it as JSON."""
    places = roots(unpacked, data)
    found = {origin.name: texts.read(origin, places[origin.name]) for origin in texts.ORIGINS}
    words = Counter(word for listed in found.values() for text in listed for word in set(re.findall(r"[a-z]+", text.lower())))
    names = texts.wordnet_names(places["wordnet"])
    for kind in ("role", "event"):
        names[kind] = [word for word in names[kind] if words[word] >= COMMON]
    found["captions recombined"] = recombine.captions(found["snli"], CAPTIONS)
    found["news patterns"] = recombine.news(names, NEWS)
    found["documentation as questions"] = recombine.questions([*found["python-docstrings"], *found["python-manual"], *found["gnome"]])

    distinct: dict[str, tuple[str, str]] = {}
    for origin, listed in found.items():
        for text in listed:
            distinct.setdefault(normal(text), (text, origin))
    evaluated = evaluation(data)
    kept = [row for key, row in distinct.items() if key not in evaluated]
    random.Random(0).shuffle(kept)
    pq.write_table(pa.table({"text": [text for text, _ in kept], "origin": [origin for _, origin in kept]}), out)
    accounts: dict[str, object] = {
        "texts": len(kept),
        "words": sum(len(text.split()) for text, _ in kept),
        "by_origin": dict(Counter(origin for _, origin in kept).most_common()),
        "repeated": sum(len(listed) for listed in found.values()) - len(distinct),
        "taken_out": dict(Counter(origin for key, (_, origin) in distinct.items() if key in evaluated).most_common()),
        "evaluation_texts": len(evaluated),
    }
    out.with_suffix(".json").write_text(json.dumps(accounts, indent=1) + "\n", encoding="utf-8")
    return accounts


def evaluation(data: Path) -> set[str]:
    """What no text may equal, as ``normal`` writes it."""
    demonstrations = (data / "icl_demos/demos.jsonl").read_text(encoding="utf-8").splitlines()
    found = [*collection().kept_out, *(json.loads(line)["sentence"] for line in demonstrations)]
    known = {normal(text) for text in found}
    for suite in SUITES:
        settings = EvaluateSettings.make({"model": "none", "suite": [suite], "data": str(data)})
        building = Building(settings=settings, data=DataPlace.of(str(data)), spec=None, wanted=[], scratch=str(data), on_cluster=False)
        for task in suite_of(suite).build(building):
            known |= {normal(text) for need in task.needs() if isinstance(need, Texts) for text in need.texts}
    return known - {""}
