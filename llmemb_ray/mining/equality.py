"""Which texts count as the same, and where in a corpus the texts of queries and positives stand.

Invariant: texts are the same if they are equal without case and white space. Memory holds 8 bytes for each text looked for and 20 for each
row that has one of them, never the corpus, whose texts are streamed. Knows nothing of scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.reading import UNIT_BUFFER_BYTES, batches, check_unchanged
from llmemb_ray.corpus.units import PlannedFile
from llmemb_ray.errors import InputError
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Access, locate, redact

Ints = npt.NDArray[np.int64]

NONE = 0
"""The key that no text has."""

ROW_BITS = 40
"""Of a place, for the row in its file."""

UNDER_WAY_PER_CPU = 2


def normal(text: str) -> str:
    """Without case and without any white space."""
    return "".join(text.casefold().split())


def key(text: str) -> int:
    """63 bits of a digest of ``normal(text)``. Among a billion rows, a million texts meet a stranger with probability 1e-4: one candidate too few."""
    value = int.from_bytes(hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") >> 1
    return value or 1


def keys(texts: Sequence[str]) -> Ints:
    """int64 [N]"""
    return np.fromiter((key(text) for text in texts), np.int64, len(texts))


def places(files: npt.NDArray[np.integer], rows: npt.NDArray[np.integer]) -> Ints:
    """int64 [N] that tell rows of a corpus apart. files: index in the plan."""
    return (files.astype(np.int64) << ROW_BITS) + rows


@dataclass(frozen=True)
class Standing:
    """Where known texts stand. places: int64 [N], sorted; keys: int64 [N]."""

    places: Ints
    keys: Ints

    def keys_at(self, places: Ints) -> Ints:
        """int64, of the shape of ``places``: the key of the text there, ``NONE`` if it is none of those looked for."""
        if not len(self.places):
            return np.zeros(places.shape, np.int64)
        where = np.minimum(np.searchsorted(self.places, places), len(self.places) - 1)
        return np.where(self.places[where] == places, self.keys[where], NONE)

    def table(self) -> pa.Table:
        return pa.table({"place": self.places, "key": self.keys})

    @classmethod
    def of(cls, table: pa.Table) -> Standing:
        return cls(table["place"].to_numpy(), table["key"].to_numpy())


def look(run: Run, wanted: Ints, *, on_cluster: bool) -> Standing:
    """Where the texts with the keys ``wanted`` (sorted) stand in the corpus of ``run``; a task a file on the Ray that is connected, or here.

    Raises InputError for a file that changed or is gone, RunFailed where a task is lost.
    """
    files = [file for file in run.plan.files if file.problem is None]
    selection = Selection(text=run.plan.selection.text, max_bytes=run.plan.selection.max_bytes)
    parts = (
        _on_cluster(files, selection, run.storage.access, wanted) if on_cluster else (_in_file(file, selection, run.storage.access, wanted) for file in files)
    )
    found = list(parts)
    where = np.concatenate([np.zeros(0, np.int64), *(part.places for part in found)])
    what = np.concatenate([np.zeros(0, np.int64), *(part.keys for part in found)])
    order = np.argsort(where)
    return Standing(where[order], what[order])


def _in_file(file: PlannedFile, selection: Selection, access: Access, wanted: Ints) -> Standing:
    check_unchanged(file, access)
    storage, name = locate(file.url, access)
    where, what = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    row = 0
    try:
        with storage.open(name, file.size) as reader:
            for table in batches(reader, file, range(len(file.group_rows)), selection, buffer_bytes=UNIT_BUFFER_BYTES):
                texts, _ = selection.texts(table)
                found = np.fromiter((NONE if text is None else key(text) for text in texts), np.int64, len(texts))
                here = np.flatnonzero(np.isin(found, wanted))
                where.append(places(np.full(len(here), file.index), row + here))
                what.append(found[here])
                row += table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{redact(file.url)} cannot be read: {error}; bring the file back as it was embedded") from error
    return Standing(np.concatenate(where), np.concatenate(what))


def _on_cluster(files: Sequence[PlannedFile], selection: Selection, access: Access, wanted: Ints) -> Iterator[Standing]:
    import ray

    room = UNDER_WAY_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    task, shared = ray.remote(num_cpus=1)(_in_file), ray.put(wanted)
    under_way: list[Any] = []
    for file in files:
        if len(under_way) >= room:
            done, under_way = ray.wait(under_way, num_returns=1)
            yield _get(done[0])
        under_way.append(task.remote(file, selection, access, shared))
    for reference in under_way:
        yield _get(reference)


def _get(reference: Any) -> Standing:
    from llmemb_ray.connection import result_of

    return result_of(reference, "a task that reads the corpus")  # type: ignore[no-any-return]
