"""Examples that stand in a run twice: found when all units are done, the first by row stays, the others become rejects.

Invariant: what is kept follows from the examples and their rows, whoever made them in whatever order, and from nothing that a stopped
pass left behind: what it moved already was no first, and what equals a near duplicate is told so after that was moved too.
Exact: query, positive and negative are the same strings (paper 2, section 3.1); digests lie on the local disk, 24 bytes each.
Near: MinHash signatures of runs of characters in memory, about 8 kB an example.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmemb_ray import parquet
from llmemb_ray.shards.partitions import Partitions, sortable
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis.commits import RECORDS, Made
from llmemb_ray.synthesis.units import REJECT_ROWS, put_examples, put_rejects

EXACT, NEAR = "duplicate", "near_duplicate"
REASONS = (EXACT, NEAR)

TEXTS = ("query", "positive", "negative")

PERMUTATIONS = 128
"""Of a MinHash signature: the error of a Jaccard similarity is about 1/sqrt(128) = 0.09."""

MISSED = 0.05, 0.95
"""Weights of candidates in vain and of near duplicates passed over, by which the index is laid out. Candidates are compared by their signatures, which is
cheap; with equal weights 6 in 10 of the pairs just as alike as asked for (0.8) are no candidates, with these 1 in 20."""

STRICTEST = 0.95
"""Similarity that the index is laid out for at most: beyond it has no layout, and at 1 exact duplicates but for case and white space are left."""

SHINGLE = 3
"""Characters of a shingle: words of any script, and scripts without spaces, are alike by their parts."""

_SPACE = re.compile(r"\s+")


def find(output: Storage, commits: Sequence[Made], *, near: float | None) -> dict[int, tuple[int, str]]:
    """Row -> (the row that stays, ``EXACT`` or ``NEAR``). near: Jaccard similarity of the shingles from which examples are near duplicates."""
    found: dict[int, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory(prefix="llmemb-duplicates-") as directory:
        partitions = Partitions(Path(directory))
        for table in _shards(output, commits):
            partitions.add(_digests(zip(*(table[name].to_pylist() for name in TEXTS), strict=True)), table["row"].to_numpy())
        for rejects in _moved(output, commits):
            made = [json.loads(raw) for raw in rejects["raw"].to_pylist()]
            partitions.add(_digests(tuple(one[name] for name in TEXTS) for one in made), rejects["row"].to_numpy())
        for digests, rows in partitions:
            order = np.lexsort((rows, *(sortable(digests)[name] for name in ("low", "high"))))
            ordered, rows = sortable(digests)[order], rows[order]
            first = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, np.bool_)
            stays = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))] if len(rows) else rows
            found |= {int(row): (int(kept), EXACT) for row, kept in zip(rows[~first], stays[~first], strict=True)}
    if near is not None:
        found |= _near(output, commits, near, found)
    return found


def remove(output: Storage, run_key: str, commits: Sequence[Made], found: dict[int, tuple[int, str]]) -> list[Made]:
    """Moves what was found to the rejects of its unit; the commits as they stand then. Can be stopped and repeated."""
    standing = []
    rows = np.asarray(sorted(found), np.int64)
    for commit in commits:
        first, last = np.searchsorted(rows, [commit.start, commit.start + commit.rows])
        standing.append(_without(output, run_key, commit, found, rows[first:last]) if last > first else commit)
    return standing


def _without(output: Storage, run_key: str, commit: Made, found: dict[int, tuple[int, str]], rows: npt.NDArray[np.int64]) -> Made:
    assert commit.shard is not None
    table = parquet.read(output.read(commit.shard))
    out = np.isin(table["row"].to_numpy(), rows)
    if not out.any():
        return commit  # All of them were moved by an earlier pass.
    moved = [_reject(row, *found[row["row"]]) for row in table.filter(pa.array(out)).to_pylist()]
    kept = table.filter(pa.array(~out))
    before = [parquet.read(output.read(commit.rejects))] if commit.rejects else []
    rejects = pa.concat_tables([*(one.cast(REJECT_ROWS) for one in before), pa.Table.from_pylist(moved, schema=REJECT_ROWS)]).sort_by("row")
    attempt = uuid.uuid4().hex[:12]
    made = replace(
        commit,
        attempt=attempt,
        accepted=kept.num_rows,
        duplicates=commit.duplicates + len(moved),
        reasons=dict(Counter(commit.reasons) + Counter(row["reason"] for row in moved)),
        notes=dict(Counter(note for notes in kept["notes"].to_pylist() for note in notes)),
        families=dict(Counter(kept["family"].to_pylist())),
        languages=dict(Counter(kept["language"].to_pylist())),
        **put_examples(output, run_key, commit.unit, attempt, kept),
        **put_rejects(output, run_key, commit.unit, attempt, rejects),
    )
    RECORDS.write(output, made)
    return made


def _reject(row: dict[str, Any], stays: int, reason: str) -> dict[str, Any]:
    texts = json.dumps({name: row[name] for name in TEXTS}, ensure_ascii=False)
    kind = "as" if reason == EXACT else "nearly as"
    return {name: row[name] for name in REJECT_ROWS.names if name in row} | {"raw": texts, "reason": reason, "detail": f"the same {kind} row {stays}"}


def _shards(output: Storage, commits: Sequence[Made]) -> Iterator[pa.Table]:
    for commit in commits:
        if commit.shard is not None:
            yield parquet.read(output.read(commit.shard), ["row", *TEXTS])


def _moved(output: Storage, commits: Sequence[Made]) -> Iterator[pa.Table]:
    """Near duplicates that an earlier pass found."""
    for commit in commits:
        if commit.rejects is not None and commit.reasons.get(NEAR):
            table = parquet.read(output.read(commit.rejects), ["row", "raw", "reason"])
            yield table.filter(pc.equal(table["reason"], NEAR))


def _digests(texts: Iterable[tuple[str | None, ...]]) -> npt.NDArray[Any]:
    made = [hashlib.blake2b(json.dumps(one, ensure_ascii=False).encode(errors="surrogatepass"), digest_size=16).digest() for one in texts]
    return np.frombuffer(b"".join(made), "V16")


def _near(output: Storage, commits: Sequence[Made], threshold: float, passed_over: dict[int, tuple[int, str]]) -> dict[int, tuple[int, str]]:
    """In order of rows: an example is near to an earlier one that is kept, or it is kept itself."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=min(threshold, STRICTEST), num_perm=PERMUTATIONS, weights=MISSED)
    kept: dict[int, Any] = {}
    found = {}
    for table in _shards(output, commits):
        columns = [table[name].to_pylist() for name in ("row", *TEXTS)]
        for row, query, positive, negative in sorted(zip(*columns, strict=True)):
            if row in passed_over:
                continue
            signature = MinHash(num_perm=PERMUTATIONS)
            signature.update_batch(_shingles(" ".join((query, positive, negative or ""))))
            near = [other for other in index.query(signature) if kept[other].jaccard(signature) >= threshold]
            if near:
                found[row] = min(near), NEAR
            else:
                kept[row] = signature
                index.insert(row, signature)
    return found


def _shingles(text: str) -> list[bytes]:
    text = _SPACE.sub(" ", text.casefold()).strip()
    return [text[place : place + SHINGLE].encode(errors="surrogatepass") for place in range(max(1, len(text) - SHINGLE + 1))]
