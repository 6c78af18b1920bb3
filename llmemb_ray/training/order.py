"""Which rows make which step: what is held out, what an epoch takes of each source, how groups are cut into batches and shuffled.

Invariant: everything follows from the numbers of rows and groups and from the seed, whoever computes it. Rows are numbers from 0 here, source
after source; texts are not known. Each drawing has a generator of its own, seeded by what it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmemb_ray.errors import ConfigError

Ints = npt.NDArray[np.int64]

HOLD, SAMPLE, PERMUTE, SHUFFLE, INSTRUCT, DRAW, INSTRUCT_ROW = range(7)
"""What a generator is for."""


@dataclass(frozen=True, kw_only=True, order=True)
class Group:
    """What rows have in common that may share a batch. negatives: used of each row; positive, teacher, scores: whether rows have them."""

    task: str
    instructions: tuple[str, ...]
    symmetric: bool
    negatives: int
    positive: bool = True
    teacher: bool = False
    scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Steps:
    """S steps of P rows in all. rows: int64 [P], in the order of steps and places; starts: int64 [S + 1], of each step in rows;
    groups: int64 [S]; instructions: int64 [S], the number of the group's instruction, -1 where it has none.
    """

    rows: Ints
    starts: Ints
    groups: Ints
    instructions: Ints

    def __len__(self) -> int:
        return len(self.groups)

    @classmethod
    def joined(cls, several: Sequence[Steps]) -> Steps:
        """One after the other."""
        offsets = np.cumsum([0, *(len(steps.rows) for steps in several)])
        return cls(
            rows=np.concatenate([steps.rows for steps in several]),
            starts=np.concatenate([*(steps.starts[:-1] + offset for steps, offset in zip(several, offsets, strict=False)), offsets[-1:]]),
            groups=np.concatenate([steps.groups for steps in several]),
            instructions=np.concatenate([steps.instructions for steps in several]),
        )


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, *numbers))


def hold_out(counts: Sequence[int], wanted: int, seed: int) -> list[Ints]:
    """Of each source with so many rows the rows held out, numbered in the source: ``wanted`` in all, in proportion.

    Raises ConfigError unless rows are left.
    """
    total = sum(counts)
    if wanted and wanted >= total:
        raise ConfigError(f"holdout: {wanted:,} of {total:,} rows leave none to train on; hold out fewer")
    exact = [wanted * count / max(1, total) for count in counts]
    shares = [int(share) for share in exact]
    for source in sorted(range(len(counts)), key=lambda source: (shares[source] - exact[source], source))[: wanted - sum(shares)]:
        shares[source] += 1
    return [
        np.sort(generator(seed, HOLD, source).choice(count, share, replace=False)).astype(np.int64) if share else np.empty(0, np.int64)
        for source, (count, share) in enumerate(zip(counts, shares, strict=True))
    ]


def apart(rows: Ints, held: Ints, anchors: Ints) -> tuple[Ints, int]:
    """Those of ``rows`` that are not held out nor have the anchor of a row that is, and how many have it and are not held out.

    held: rows held out, of all sources; anchors: int64, the key of each row's anchor
    """
    others = rows[~np.isin(rows, held)]
    same = np.isin(anchors[others], anchors[held])
    return others[~same], int(same.sum())


def held_steps(rows: Ints, group_of: npt.NDArray[np.int32], groups: Sequence[Group], batch_size: int) -> Steps:
    """Rows by group, in pieces of at most ``batch_size``; of several instructions the first."""
    order = rows[np.argsort(group_of[rows], kind="stable")]
    pieces = [
        piece
        for part in np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
        for piece in np.split(part, range(batch_size, len(part), batch_size))
        if len(piece)
    ]
    own = [int(group_of[piece[0]]) for piece in pieces]
    return Steps(
        rows=order,
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        groups=np.array(own, np.int64),
        instructions=np.array([0 if groups[group].instructions else -1 for group in own], np.int64),
    )


def epoch_steps(
    sources: Sequence[Ints],
    weights: Sequence[float],
    group_of: npt.NDArray[np.int32],
    groups: Sequence[Group],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> tuple[Steps, dict[int, tuple[int, int]]]:
    """The steps of an epoch, and (rows taken, rows left out) of each group: those that fill no batch.

    sources: numbers of the rows that each may give; weights: share of them that is taken, above 1 rows repeat
    """
    layers: list[list[Ints]] = []
    for source, (rows, weight) in enumerate(zip(sources, weights, strict=True)):
        whole, rest = divmod(round(weight * len(rows)), max(1, len(rows)))
        sample = np.sort(generator(seed, SAMPLE, epoch, source).choice(rows, rest, replace=False)) if rest else rows[:0]
        for layer, part in enumerate([*[rows] * whole, sample]):
            if layer == len(layers):
                layers.append([])
            layers[layer].append(part)
    taken: dict[int, list[Ints]] = {}
    for layer, parts in enumerate(layers):  # Each copy of a group is gone through before the next: a row meets itself in no batch but at a seam.
        rows = np.concatenate(parts)
        rows = rows[np.argsort(group_of[rows], kind="stable")]
        for part in np.split(rows, np.flatnonzero(np.diff(group_of[rows])) + 1):
            if len(part):
                group = int(group_of[part[0]])
                taken.setdefault(group, []).append(generator(seed, PERMUTE, epoch, group, layer).permutation(part))
    batches, own, counts = [], [], {}
    for group in sorted(taken):
        rows = np.concatenate(taken[group])
        full = len(rows) // batch_size
        counts[group] = len(rows), len(rows) - full * batch_size
        batches.append(rows[: full * batch_size].reshape(full, batch_size))
        own.append(np.full(full, group, np.int64))
    of_step = np.concatenate(own) if own else np.empty(0, np.int64)
    shuffled = generator(seed, SHUFFLE, epoch).permutation(len(of_step))
    of_step = of_step[shuffled]
    drawn = generator(seed, INSTRUCT, epoch).integers(0, 2**31, len(of_step))
    told = np.array([len(groups[group].instructions) for group in of_step], np.int64)
    return Steps(
        rows=np.concatenate(batches)[shuffled].reshape(-1) if batches else np.empty(0, np.int64),
        starts=np.arange(len(of_step) + 1, dtype=np.int64) * batch_size,
        groups=of_step,
        instructions=np.where(told > 0, drawn % np.maximum(told, 1), -1),
    ), counts


def draw(positives: int, negatives: int, used: int, *, seed: int, epoch: int, row: int) -> tuple[int, list[int]]:
    """The positive of a row, and the ``used`` of its negatives, in their order; those of fewer draws than all vary with the epoch."""
    if positives <= 1 and negatives <= used:
        return 0, list(range(negatives))
    random = generator(seed, DRAW, epoch, row)
    positive = int(random.integers(positives)) if positives > 1 else 0
    return positive, sorted(random.choice(negatives, used, replace=False).tolist()) if used < negatives else list(range(negatives))


def draw_instruction(count: int, *, seed: int, epoch: int, row: int) -> int:
    """Which of its source's ``count`` instructions a row takes in an epoch; of what is held out, epoch 0, the first."""
    return int(generator(seed, INSTRUCT_ROW, epoch, row).integers(count)) if count > 1 and epoch else 0
