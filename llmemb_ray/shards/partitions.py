"""Sets of digests too large for memory: spread over files on the local disk by their first byte, one file in memory at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmemb_ray.corpus.columns import id_values

Digests = npt.NDArray[Any]
"""V16 [N]: 16 bytes each."""

COUNT = 64


class Partitions:
    """Digests by partition, with a number of 64 bits beside each. Costs 24 bytes of disk a digest."""

    _RECORD = np.dtype([("digest", "V16"), ("number", "<i8")])

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = [directory / f"{partition:02d}" for partition in range(COUNT)]

    def add(self, digests: Digests, numbers: npt.NDArray[np.int64] | None = None) -> None:
        records = np.zeros(len(digests), self._RECORD)
        records["digest"] = digests
        if numbers is not None:
            records["number"] = numbers
        places = partition_of(digests)
        for partition in np.unique(places):
            with open(self._paths[partition], "ab") as file:
                file.write(records[places == partition].tobytes())

    def __iter__(self) -> Iterator[tuple[Digests, npt.NDArray[np.int64]]]:
        """(digests, numbers) of each partition, empty ones included, in one order for all sets."""
        for path in self._paths:
            records = np.fromfile(path, self._RECORD) if path.exists() else np.zeros(0, self._RECORD)
            yield records["digest"], records["number"]


def partition_of(digests: Digests) -> npt.NDArray[np.uint8]:
    """uint8 [N]: the partition that each digest belongs to, by its first byte."""
    partitions: npt.NDArray[np.uint8] = np.ascontiguousarray(digests).view(np.uint8).reshape(-1, 16)[:, 0] % COUNT
    return partitions


def sortable(digests: Digests) -> npt.NDArray[Any]:
    """Two unsigned numbers a digest: unlike bare bytes, numpy sorts and compares them fast."""
    return np.ascontiguousarray(digests).view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)


def id_digests(ids: pa.ChunkedArray) -> Digests:
    """Digests of the ids that are not null, by their Python values."""
    data = b"".join(hashlib.blake2b(repr(value).encode(), digest_size=16).digest() for value in id_values(ids) if value is not None)
    return np.frombuffer(data, dtype="V16")


def binary_digests(column: pa.ChunkedArray) -> Digests:
    """The values of a column of 16-byte binaries."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.binary(16))
    buffer = array.buffers()[1]
    whole = np.frombuffer(buffer, dtype="V16") if buffer is not None else np.zeros(0, "V16")
    return whole[array.offset : array.offset + len(array)]
