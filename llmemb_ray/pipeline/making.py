"""From the prompts of a unit to its vectors: copied from an earlier run or an identical prompt where asked for, else embedded.

Invariant: a vector that is copied is one that the same tokens had in the same space; each prompt is embedded,
copied or failed, and counted as one of them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.embedders.work import Work
from llmemb_ray.pipeline.prepare import Job, Prepared
from llmemb_ray.shards.partitions import binary_digests
from llmemb_ray.shards.precision import Precision
from llmemb_ray.shards.reuse import Copies
from llmemb_ray.shards.schema import CHUNK_COLUMNS

OnPack = Callable[[int, int], None]
"""Called with (rows, tokens) of each pack that is done."""

Computing = Callable[[], AbstractContextManager[None]]
"""What is entered while the engine is at the unit's rows, and at no other's."""

Floats = npt.NDArray[np.float32]
Failures = dict[int, tuple[str, str]]
"""Row -> (reason, detail)"""

REMEMBERED_BYTES = 256 * 2**20
"""Vectors that an actor remembers for ``dedup``: the window in which a prompt that comes again is not embedded again."""


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """How to embed a unit that has killed its engine before, so that the row at fault is found.

    ranges: row ranges to embed one after the other; ``entering(range)`` is called before each is computed, ``entering(None)`` after
        it, and outlives the process: of the units of an actor only the one that is being computed is told of at any moment
    poison: rows known to kill the engine
    last_words: what the engine said when it died, if anything
    """

    ranges: list[tuple[int, int]]
    poison: frozenset[int] = frozenset()
    last_words: str = ""
    entering: Callable[[tuple[int, int] | None], None] = field(default=lambda _: None)

    @contextmanager
    def entered(self, rows: tuple[int, int]) -> Iterator[None]:
        """While a range is computed; one whose engine breaks stays entered."""
        self.entering(rows)
        yield
        self.entering(None)


class Remembered:
    """The vectors of the prompts seen last, by their hash; bounded in bytes. Several threads may use it."""

    def __init__(self, limit_bytes: int = REMEMBERED_BYTES) -> None:
        self._vectors: OrderedDict[bytes, Floats] = OrderedDict()
        self._room = limit_bytes
        self._lock = threading.Lock()

    def get(self, hash_: bytes) -> Floats | None:
        with self._lock:
            vector = self._vectors.get(hash_)
            if vector is not None:
                self._vectors.move_to_end(hash_)
            return vector

    def put(self, hash_: bytes, vector: Floats) -> None:
        with self._lock:
            if hash_ in self._vectors:
                return
            self._vectors[hash_] = vector.copy()
            self._room -= vector.nbytes
            while self._room < 0:
                self._room += self._vectors.popitem(last=False)[1].nbytes


@dataclass(kw_only=True)
class Workshop:
    """What a process keeps from unit to unit, besides the model."""

    precision: Precision
    """With its calibration."""
    remembered: Remembered = field(default_factory=Remembered)


@dataclass(kw_only=True)
class Made:
    """rows: a row of the shard each, failed ones included; vectors: float32 [N, D], zero where there is none yet."""

    rows: pa.Table
    vectors: Floats
    failed: Failures
    work: Work
    tokens: int
    """Of all prompts, copied ones included."""
    tokens_copied: int = 0
    copied: int = 0
    reused: int = 0
    copies: Copies | None = None
    """Of rows, from the earlier run."""


@dataclass(frozen=True)
class Making:
    """The making of one unit's vectors."""

    job: Job
    prepared: Prepared
    embedder: Embedder
    workshop: Workshop
    on_pack: OnPack | None = None
    computing: Computing = nullcontext

    def vectors(self, isolation: Isolation | None) -> Made:
        prompts = self.prepared.accepted
        pooled = self.job.chunking is not None and self.job.chunking.pool == "mean"
        rows, owner = _texts(prompts) if pooled else (prompts, np.arange(prompts.num_rows))
        copies = self.job.reuse.copies(rows["prompt_hash"], self._copying) if self.job.reuse and rows.num_rows else None
        todo = np.flatnonzero(~copies.found[owner]) if copies else np.arange(prompts.num_rows)
        vectors_MD = np.zeros((prompts.num_rows, self.embedder.dimension), np.float32)
        again = np.zeros(0, np.int64)
        failed: Failures = {}
        if isolation is not None:
            work = self._isolated(todo, vectors_MD, failed, isolation)
        elif self.job.dedup:
            work, again = self._deduplicated(todo, vectors_MD, failed)
        else:
            work = self._embedded(todo, vectors_MD, failed)
        lengths = self.prepared.tokens.lengths
        earlier = np.setdiff1d(np.arange(prompts.num_rows), todo)
        saved = int(lengths[again].sum() + lengths[earlier].sum())
        vectors, failures = _mean(vectors_MD, owner, rows.num_rows, failed, self.workshop.precision.normalized) if pooled else (vectors_MD, failed)
        if copies:
            vectors[copies.found] = copies.vectors[copies.found]
        return Made(
            rows=rows,
            vectors=vectors,
            failed=failures,
            work=work,
            tokens=int(lengths.sum()),
            tokens_copied=saved,
            copied=len(again),
            reused=len(earlier),
            copies=copies,
        )

    def _copying(self) -> None:
        """A sign: it goes on, though nothing is computed."""
        if self.on_pack is not None:
            self.on_pack(0, 0)

    def _embedded(self, todo: npt.NDArray[np.int64], vectors: Floats, failed: Failures, turn: AbstractContextManager[None] | None = None) -> Work:
        """Embeds the prompts ``todo`` into their places in ``vectors``. turn: entered while they are computed."""
        tokens = self.prepared.tokens
        chosen = tokens if len(todo) == len(tokens) else tokens.take(todo.tolist())
        result = self.embedder.embed_tokens(chosen, self.job.role, on_pack=self.on_pack, turn=self._turn(turn or nullcontext()))
        vectors[todo] = result.vectors
        failed |= {int(todo[row]): ("engine", detail) for row, detail in result.failed.items()}
        return result.work

    @contextmanager
    def _turn(self, turn: AbstractContextManager[None]) -> Iterator[None]:
        with self.computing(), turn:
            yield

    def _deduplicated(self, todo: npt.NDArray[np.int64], vectors: Floats, failed: Failures) -> tuple[Work, npt.NDArray[np.int64]]:
        """The same with each prompt once; also the prompts whose vector was copied and can be used."""
        hashes = [value.tobytes() for value in binary_digests(self.prepared.accepted["prompt_hash"])]
        first: dict[bytes, int] = {}
        later: list[tuple[int, int]] = []
        copied: list[int] = []
        for row in todo.tolist():
            vector = self.workshop.remembered.get(hashes[row])
            if vector is not None:
                vectors[row] = vector
                copied.append(row)
            elif hashes[row] in first:
                later.append((row, first[hashes[row]]))
            else:
                first[hashes[row]] = row
        work = self._embedded(np.fromiter(first.values(), np.int64, len(first)), vectors, failed)
        for row, same in later:
            vectors[row] = vectors[same]
            if same in failed:
                failed[row] = failed[same]
            elif np.isfinite(vectors[row]).all():
                copied.append(row)
        for hash_, row in first.items():
            if row not in failed and np.isfinite(vectors[row]).all():
                self.workshop.remembered.put(hash_, vectors[row])
        return work, np.asarray(copied, np.int64)

    def _isolated(self, todo: npt.NDArray[np.int64], vectors: Floats, failed: Failures, isolation: Isolation) -> Work:
        """The same, range by range, without the rows that are known to kill the engine."""
        said = f": {isolation.last_words}" if isolation.last_words else ""
        reason = ("kills_engine", f"the process that held the model died on this row, again and again{said}")
        failed |= dict.fromkeys(isolation.poison & set(todo.tolist()), reason)
        work = Work()
        for first, last in isolation.ranges:
            here = [row for row in todo.tolist() if first <= row < last and row not in isolation.poison]
            work.add(self._embedded(np.asarray(here, np.int64), vectors, failed, isolation.entered((first, last))))
        return work


def _texts(prompts: pa.Table) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """One row a text, from a row a chunk, with the row of each chunk: tokens summed up, its hash that of its chunks' hashes."""
    source = prompts["source_row"].to_numpy()
    first = np.flatnonzero(np.concatenate([[True], source[1:] != source[:-1]])) if len(source) else np.zeros(0, np.int64)
    owner = np.searchsorted(first, np.arange(len(source)), side="right") - 1
    rows = prompts.take(pa.array(first)).drop_columns([*CHUNK_COLUMNS, "token_ids"])
    if not len(first):
        return rows, owner
    tokens = np.add.reduceat(prompts["n_tokens"].to_numpy().astype(np.int64), first).astype(np.int32)
    truncated = np.logical_or.reduceat(prompts["truncated"].to_numpy(), first)
    digests = binary_digests(prompts["prompt_hash"])
    hashes = pa.array([hashlib.blake2b(part.tobytes(), digest_size=16).digest() for part in np.split(digests, first[1:])], pa.binary(16))
    for name, values in (("n_tokens", pa.array(tokens)), ("truncated", pa.array(truncated)), ("prompt_hash", hashes)):
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return rows, owner


def mean_by(vectors_MD: Floats, owner: npt.NDArray[np.int64], texts: int, normalized: bool) -> Floats:
    """float32 [texts, D]: the mean of each text's vectors; normalized: of norm 1."""
    total = np.zeros((texts, vectors_MD.shape[1]), np.float32)
    np.add.at(total, owner, vectors_MD)
    counts = np.maximum(np.bincount(owner, minlength=texts), 1).astype(np.float32)
    mean: Floats = np.divide(total, np.expand_dims(counts, 1), dtype=np.float32)
    if normalized:
        mean = np.divide(mean, np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12), dtype=np.float32)
    return mean


def _mean(vectors_MD: Floats, owner: npt.NDArray[np.int64], texts: int, failed: Failures, normalized: bool) -> tuple[Floats, Failures]:
    """The mean of each text's vectors, of norm 1 again where they had it; a text fails with the first of its chunks."""
    failures: Failures = {}
    for row in sorted(failed):
        failures.setdefault(int(owner[row]), failed[row])
    return mean_by(vectors_MD, owner, texts, normalized), failures
