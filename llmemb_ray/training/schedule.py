"""How the learning rate rises and falls, and the seeds of a step. Pure functions of the step, so that a training goes on anywhere."""

from __future__ import annotations

import hashlib
import math
from typing import Literal


def learning_rate(step: int, *, steps: int, warmup: int, highest: float, schedule: Literal["linear", "cosine", "constant"]) -> float:
    """Of step ``step``, counted from 0, of ``steps``: rises for ``warmup`` steps, then falls to zero at the end."""
    if step < warmup:
        return highest * (step + 1) / warmup
    if schedule == "constant":
        return highest
    part = (step - warmup) / max(1, steps - warmup)
    return highest * (1 - part if schedule == "linear" else (1 + math.cos(math.pi * part)) / 2)


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that every machine draws alike from some numbers."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
