"""Retrieval: judged queries against a corpus, by exact search over the shards of its run.

Invariant: a query's ranking is that of its exact scores, equal ones in the order of the corpus, and the metrics see that ranking alone
(trec_eval, given scores, rounds them to float32 and puts the higher document id first among equal ones). Every judged query counts:
one without results as 0. The corpus is a run that is streamed; memory holds ``top_k`` ids for each query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pyarrow as pa

from llmemb_ray.corpus.columns import id_values
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation import beir
from llmemb_ray.evaluation.beir import Collection, Documents, Judgements
from llmemb_ray.evaluation.suite import Building, Corpus, Floats, Need, Score, Suite, Task, Texts, choose
from llmemb_ray.search import exact
from llmemb_ray.shards.run import Run

MAIN = "nDCG@10"

RECALL_AT = (1, 5, 10, 100, 1000)

QUERY_BLOCK = 256
"""Queries whose rankings are Python objects at once."""

PAPER_NAMES = {
    "climate-fever": "ClimateFEVER",
    "cqadupstack": "CQADupstackRetrieval",
    "dbpedia-entity": "DBPedia",
    "fiqa": "FiQA2018",
    "quora": "QuoraRetrieval",
    "scidocs": "SCIDOCS",
    "scifact": "SciFact",
    "trec-covid": "TRECCOVID",
    "webis-touche2020": "Touche2020",
    **{name.casefold(): name for name in ("ArguAna", "FEVER", "HotpotQA", "MSMARCO", "NFCorpus", "NQ")},
}
"""The names under which paper 2 gives instructions, by BEIR's names of directories."""


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """One collection, its documents already Parquet files."""

    name: str
    collection: Collection
    documents: Documents | None
    """None where no model is asked for: then only the queries are wanted."""
    instruction: str | None
    top_k: int
    on_cluster: bool = False

    def needs(self) -> list[Need]:
        """The judged queries, and the documents as a run."""
        queries = Texts(texts=list(self.collection.queries.values()), role="query", instruction=self.instruction)
        if self.documents is None:
            return [queries]
        return [queries, Corpus(name=self.documents.directory, files=self.documents.files, text_column=beir.TEXT_COLUMN)]

    def score(self, embedded: list[Any]) -> Score:
        """embedded: [float32 [Q, D] of the queries, the finished Run of the documents]"""
        judgements = self.collection.judgements
        judged = {document for gains in judgements.values() for document in gains}
        run: Run = embedded[1]
        assert self.documents is not None
        by_query = list(self.measured(embedded[0], run).values())
        parts: dict[str, Any] = {name: 100 * float(np.mean([metrics[name] for metrics in by_query])) for name in by_query[0]}
        parts |= {
            "split": self.collection.split,
            "queries": len(judgements),
            "documents": self.documents.count,
            "rejected_documents": sum(commit.rejected for commit in run.commits),
            "judgements": sum(len(gains) for gains in judgements.values()),
            "unknown_documents": len(judged - self.documents.known(judged)),
        }
        if self.collection.note:
            parts["note"] = self.collection.note
        return Score(main=parts[MAIN], parts=parts)

    def ndcg_by_query(self, embedded: list[Any]) -> dict[str, float]:
        """nDCG@10 (0 to 1) by query id, from what ``score`` takes."""
        return {query: metrics[MAIN] for query, metrics in self.measured(embedded[0], embedded[1]).items()}

    def measured(self, queries_QD: Floats, run: Run) -> dict[str, dict[str, float]]:
        """Every metric (0 to 1) by query id and name."""
        queries = list(self.collection.queries)
        if len(queries_QD) != len(queries):
            raise ValueError(f"{self.name}: {len(queries_QD)} vectors for {len(queries)} queries")
        apart = self.collection.ignore_identical_ids
        most = self.top_k + 1 if apart else self.top_k  # One more, for the document that may have the query's own id.
        if self.on_cluster:
            from llmemb_ray.search import cluster

            table = cluster.search_table(run, queries_QD, top_k=most)
        else:
            table = exact.search_table(run, queries_QD, top_k=most)
        measured: dict[str, dict[str, float]] = {}
        for block in rankings(table, queries):
            if apart:
                block = {query: [id_ for id_ in ids if id_ != query] for query, ids in block.items()}
            judgements = {query: self.collection.judgements[query] for query in block}
            measured |= measure(judgements, {query: ids[: self.top_k] for query, ids in block.items()}, self.top_k)
        return measured


def rankings(table: pa.Table, queries: Sequence[str]) -> Iterator[dict[str, list[str]]]:
    """Ids of documents, best first, by query id, some queries at a time; [] for a query without results.

    table: as of ``exact.results``, by query and rank; queries: their ids by number.
    """
    numbers = table["query"].to_numpy()
    edges = np.searchsorted(numbers, np.arange(len(queries) + 1))
    for first in range(0, len(queries), QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, len(queries))
        ids = id_values(table["id"].slice(edges[first], edges[last] - edges[first]))
        starts = edges[first : last + 1] - edges[first]
        yield {queries[first + place]: ids[starts[place] : starts[place + 1]] for place in range(last - first)}


def measure(judgements: Judgements, ranked: Mapping[str, Sequence[str]], top_k: int) -> dict[str, dict[str, float]]:
    """Metrics (0 to 1) by query id and name, of every query that is judged.

    nDCG@10 with the gains as they are and a discount of log2(1 + rank); MAP@top_k (trec_eval's map of a ranking of that depth), MRR@10,
    Recall@k and P@10 with every gain above 0 relevant. ranked: ids of documents by query id, best first.
    """
    names = {MAIN: ir_measures.nDCG @ 10, f"MAP@{top_k}": ir_measures.AP @ top_k, "MRR@10": ir_measures.RR @ 10, "P@10": ir_measures.P @ 10}
    names |= {f"Recall@{k}": ir_measures.R @ k for k in RECALL_AT if k <= top_k}
    run = {query: {id_: float(-rank) for rank, id_ in enumerate(ranked.get(query, ()))} for query in judgements}
    by_measure = {str(measure): name for name, measure in names.items()}
    measured: dict[str, dict[str, float]] = {query: dict.fromkeys(names, 0.0) for query in judgements}
    for metric in ir_measures.iter_calc(list(names.values()), judgements, run):
        measured[metric.query_id][by_measure[str(metric.measure)]] = float(metric.value)
    return measured


def build(building: Building) -> list[Task]:
    """Tasks of the collections in the data directory that have judgements of the split, of groups of them, and of directories named by their path."""
    split = building.settings.split
    found = beir.find(building.data.root)
    chosen: dict[str, Path] = {}
    if building.wanted:
        folded = {name.casefold() for name in found}
        named, paths = [], []
        for name in building.wanted:
            members = [other for other in found if name.casefold() in beir.GROUPS and other.startswith(f"{name.casefold()}/")]
            if members:
                named += members
            elif name.casefold() in folded or not beir.is_path(name):
                named.append(name)
            else:
                paths.append(name)
        chosen = {name: found[name] for name in choose(named, found, "retrieval")} if named else {}
        for path in paths:
            for name, place in _at(path).items():
                if chosen.setdefault(name, place).resolve() != place.resolve():
                    raise ConfigError(f"suite: retrieval: {place} and {chosen[name]} have the same name; evaluate them one after the other")
    else:
        chosen = {name: place for name, place in found.items() if split in beir.splits(place)}
        if not chosen:
            there = ", ".join(f"{name} ({', '.join(beir.splits(place))})" for name, place in found.items())
            raise InputError(
                f"{building.data.root} has no collection with judgements of the split {split!r}; "
                + (f"there are {there}: set --split" if found else f"looked for {'; or '.join(layout.files for layout in beir.LAYOUTS)}")
            )
    return [_task(building, name, place) for name, place in chosen.items()]


def _at(path: str) -> dict[str, Path]:
    """The collection, or those of the group, in a directory."""
    place = Path(path).expanduser()
    if not place.is_dir():
        raise ConfigError(f"suite: retrieval:{path}: there is no such directory")
    members = beir.find(place) if place.resolve().name.casefold() in beir.GROUPS else {}
    return members or {beir.name_of(place): place}


def paper_name(name: str) -> str:
    """Of a collection, or of its group, as paper 2's instructions are listed."""
    group, _, _ = name.casefold().partition("/")
    last = name.rpartition("/")[2]
    return PAPER_NAMES.get(group) or PAPER_NAMES.get(last.casefold(), last)


def _task(building: Building, name: str, place: Path) -> RetrievalTask:
    from llmemb_ray.evaluation.instructions import instruction

    collection = beir.read(place, name, building.settings.split)
    return RetrievalTask(
        name=name,
        collection=collection,
        documents=None if building.spec is None else beir.prepare(collection, building.scratch, building.settings.access),
        instruction=instruction(paper_name(name)),
        top_k=building.settings.top_k,
        on_cluster=building.on_cluster,
    )


SUITE = Suite(name="retrieval", title="Retrieval (nDCG@10)", build=build)
