"""What does each precision of the vectors cost in found neighbours, and save in bytes?

    python benchmarks/precision.py

Embeds the demo corpus (docstrings of Python's standard library, the demo's model) and, where the evaluation data lies at hand,
SciFact's abstracts with TinyStories-656K, once for each precision, and compares the ten best rows of 500 queries with those
of float32. Queries are the first lines of every n-th text, embedded in float32. Writes benchmarks/records/precision.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

import llmemb_ray
from benchmarks.memory import write
from llmemb_ray import demo
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.search.exact import load_embedder, search_vectors
from llmemb_ray.shards.schema import raw_values

QUERIES, TOP = 500, 10

WAYS = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "int8"},
    "ubinary": {"dtype": "ubinary"},
    "ubinary, centred": {"dtype": "ubinary", "centre": True},
}
"""Each as settings of the job."""


def best(run: llmemb_ray.Run, queries_QD: np.ndarray) -> list[set[int]]:
    return [{hit.id for hit in hits} for hits in search_vectors(run, queries_QD, top_k=TOP)]


def raw_best(run: llmemb_ray.Run, queries_QD: np.ndarray) -> list[set[int]]:
    """What comparing codes as they are would find: dot products of int8 codes, Hamming distance of bits."""
    codes = np.concatenate([raw_values(table["embedding"]) for _, table in run.shards(["embedding"])])
    ids = np.concatenate([table["id"].to_numpy() for _, table in run.shards(["id"])])
    if run.plan.dtype == "int8":
        scores = queries_QD @ codes.astype(np.float32).T
    else:
        bits = np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1
        scores = np.where(queries_QD > 0, 1, -1).astype(np.float32) @ bits.T
    return [set(ids[np.argsort(-row, kind="stable")[:TOP]].tolist()) for row in scores]


def recall(found: list[set[int]], wanted: list[set[int]]) -> float:
    return round(float(np.mean([len(a & b) / TOP for a, b in zip(found, wanted, strict=True)])), 4)


def compare(name: str, texts: list[str], model: str, settings: dict[str, object], root: Path) -> dict[str, object]:
    corpus = root / f"{name}.parquet"
    pq.write_table(pa.table({"id": np.arange(len(texts)), "text": texts}), corpus, row_group_size=2000)
    step = max(1, len(texts) // QUERIES)
    queries = [text.strip().splitlines()[0][:200] for text in texts[::step]][:QUERIES]
    embedder: Embedder | None = None
    wanted: list[set[int]] = []
    rows = []
    for way, changes in WAYS.items():
        output = str(root / f"{name}-{way}".replace(", ", "-"))
        receipt = llmemb_ray.embed(str(corpus), output, model=model, actors="0", quiet=True, **settings, **changes)
        run = llmemb_ray.open_run(output)
        embedder = embedder or load_embedder(run)
        vectors = embedder.encode(queries, role="query")
        found = best(run, vectors)
        wanted = wanted or found
        row = {
            "precision": way,
            f"recall@{TOP}": recall(found, wanted),
            "bytes_a_row": round(receipt.shard_bytes / receipt.vectors, 1),
            "clipped_share": receipt.clipped_share,
        }
        if run.precision.quantised:
            row["recall_of_raw_codes"] = recall(raw_best(run, vectors), wanted)
        rows.append(row)
        print(json.dumps(row))
    return {"corpus": name, "rows": len(texts), "dimension": receipt.dimension, "queries": len(queries), "model": Path(model).name, "precisions": rows}


def main() -> None:
    results = []
    with tempfile.TemporaryDirectory(prefix="llmemb-precision-") as scratch:
        root = Path(scratch)
        texts = demo.make_corpus(root / "corpus")
        results.append(compare("demo", texts, "pocket", {}, root))
        data = Path(os.environ.get("LLMEMB_DATA", Path(__file__).parents[2] / "shared" / "data"))
        if data.is_dir():
            abstracts = [json.loads(line)["text"] for line in (data / "scifact" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
            results.append(compare("scifact", abstracts, str(data.parent / "models" / "TinyStories-656K"), {"max_tokens": 128}, root))
    write("precision", results)


if __name__ == "__main__":
    main()
