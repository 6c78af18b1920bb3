"""Units: contiguous ranges of rows of one file, the atoms of work, commit and resume.

Invariant: the units of a file depend on its row groups, ``rows_per_unit`` and the row limit alone, and
together hold each row once. A piece is what one reading task reads: whole row groups, then cut into units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SHARD_BYTES = 128 * 2**20
"""Largest shard aimed at: it is encoded in memory and goes out in one PUT."""

UNIT_TEXT_BYTES = 256 * 2**20
"""Largest text of a unit aimed at; a unit's rows are in memory at once."""

UNIT_SECONDS = 60.0
"""What one actor should work on a unit: the most that a killed actor loses."""

MAX_ROWS = 1_000_000
"""Rows of a unit at most, however small they are."""


@dataclass(frozen=True, order=True)
class Unit:
    """Rows ``start`` to ``start + rows`` of the plan's file number ``file``."""

    file: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        """Unique in the run; sorts by file and row. Stands in the names of shards and commits."""
        return f"{self.file:06d}-{self.start:012d}"


@dataclass(frozen=True)
class Piece:
    """Row groups ``groups`` of a file, whose first row is ``start``, and the units they are cut into."""

    file: int
    groups: tuple[int, ...]
    start: int
    units: tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One input file as it was when the plan was made."""

    index: int
    url: str
    size: int
    """Bytes."""
    version: str
    """etag, or modification time."""
    group_rows: tuple[int, ...] = ()
    rows: int = 0
    """Rows planned: all of the row groups, or fewer under a row limit."""
    rows_per_unit: int = 1
    partitions: dict[str, Any] = field(default_factory=dict)
    """Hive partition columns from the path."""
    generation: int = 0
    """Which plan generation brought the file: 0, or how often files had been appended."""
    problem: str | None = None
    """Why the file is left out (``skip_bad_files``); its rows are unknown."""

    def pieces(self) -> Iterator[Piece]:
        """Row groups gathered until they make a unit, or cut where one is larger."""
        groups: list[int] = []
        first, end = 0, 0
        for group, rows in enumerate(self.group_rows):
            groups.append(group)
            end = min(end + rows, self.rows)
            last = group == len(self.group_rows) - 1 or end == self.rows
            if end > first and (end - first >= self.rows_per_unit or last):
                yield Piece(self.index, tuple(groups), first, tuple(self._cut(first, end)))
                groups, first = [], end
            elif end == first:
                groups = []
            if end == self.rows:
                return

    def _cut(self, start: int, end: int) -> Iterator[Unit]:
        """Equal parts, but for one row, none above ``rows_per_unit``."""
        parts = -(-(end - start) // self.rows_per_unit)
        size, larger = divmod(end - start, parts)
        for part in range(parts):
            rows = size + (part < larger)
            yield Unit(self.index, start, rows)
            start += rows

    def units(self) -> Iterator[Unit]:
        for piece in self.pieces():
            yield from piece.units


def rows_per_unit(*, text_bytes: float, vector_bytes: float, flops_per_row: float, flops_per_second: float) -> int:
    """How many rows of a file make a unit: limited by shard bytes, text bytes, seconds and MAX_ROWS.

    text_bytes, vector_bytes: of one row on average. flops_per_second: what one actor is assumed to reach.
    """
    by_shard = SHARD_BYTES / max(vector_bytes, 1.0)
    by_text = UNIT_TEXT_BYTES / max(text_bytes, 1.0)
    by_time = UNIT_SECONDS * flops_per_second / max(flops_per_row, 1.0)
    return max(1, int(min(by_shard, by_text, by_time, MAX_ROWS)))
