"""Exact search: the best rows of a run for some queries, by streaming its shards.

Invariant: queries are embedded with the run's own model and representation, in the query role. Memory holds a
row group of vectors at a time, never the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmemb_ray.config import ModelSettings
from llmemb_ray.embedders.embedder import Embedder, settle
from llmemb_ray.errors import RunMismatch
from llmemb_ray.representation.space import differences
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Access


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One row found. ``score`` is the cosine where the run's vectors are normalised, else the inner product."""

    score: float
    id: Any
    source_file: int
    source_row: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_embedder(run: Run, access: Access | None = None, *, model: str | None = None, device: str | None = None) -> Embedder:
    """The embedder that made a run's vectors. model: where its weights are now, if not where they were.

    Raises RunMismatch, field by field, if the model found is not in the run's space; ModelError if there is none.
    """
    settings, plan = run.plan.settings, run.plan
    commit = plan.space["model"]
    values: dict[str, Any] = {"model": model or plan.model_name, "adapter": plan.adapter_name}
    values |= {name: settings[name] for name in ("quantization", "trust_remote_code", "allow_pickle") if name in settings}
    if model is None and not commit.startswith("sha256:"):
        values["revision"] = commit
    if access is not None:
        values |= {"endpoint_url": access.endpoint_url, "storage_options": access.options}
    spec = settle(ModelSettings.make(values), plan.representation)
    changed = list(differences(spec.space.to_dict(), plan.space))
    if changed:
        lines = "\n".join(f"  {name}: the run has {theirs!r}, {values['model']} has {ours!r}" for name, ours, theirs in changed)
        raise RunMismatch(f"{values['model']} is not in the vector space of {run.url}:\n{lines}")
    return Embedder(spec, device=device)


def search(run: Run, texts: list[str], *, top_k: int = 5, embedder: Embedder | None = None) -> list[list[Hit]]:
    """The ``top_k`` best rows for each text, best first; ties in the order of the corpus."""
    embedder = embedder or load_embedder(run, run.storage.access)
    return search_vectors(run, embedder.encode(texts, role="query"), top_k=top_k)


def search_vectors(run: Run, queries_QD: npt.NDArray[np.float32], *, top_k: int) -> list[list[Hit]]:
    """queries_QD: float32 [Q, D] in the run's space."""
    best: list[list[tuple[float, int, int, Any]]] = [[] for _ in queries_QD]
    with_id = ["id"] if run.plan.selection.id else []
    for _, table in run.shards([*with_id, "source_file", "source_row", "embedding"]):
        scores_QN = queries_QD @ run.precision.decode(table["embedding"]).T
        files, rows = table["source_file"], table["source_row"]
        for query, scores_N in enumerate(scores_QN):
            found = [
                (-float(scores_N[i]), files[i].as_py(), rows[i].as_py(), table["id"][i].as_py() if with_id else None) for i in _top(scores_N, top_k).tolist()
            ]
            best[query] = sorted(best[query] + found, key=lambda hit: hit[:3])[:top_k]
    return [[Hit(score=-score, source_file=file, source_row=row, id=id_) for score, file, row, id_ in hits] for hits in best]


def _top(scores_N: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Positions of the ``count`` largest scores; of equal ones at the border the first, which a partition alone does not promise."""
    if count >= len(scores_N):
        return np.arange(len(scores_N))
    border = np.partition(scores_N, len(scores_N) - count)[len(scores_N) - count]
    above = np.flatnonzero(scores_N > border)
    return np.concatenate([above, np.flatnonzero(scores_N == border)[: count - len(above)]])
