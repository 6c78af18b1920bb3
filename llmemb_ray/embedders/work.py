"""What a backend gives back: pooled states, and what was computed for them, counted in tokens. Plain data, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Work:
    """What was computed, in tokens; sums up over packs."""

    tokens: int = 0
    """Tokens of all prompts, as if each were computed whole."""
    computed: int = 0
    """Tokens that went through the model, padding included."""
    padding: int = 0
    shared: int = 0
    """Tokens not computed because the prefix was shared."""
    shareable: int = 0
    """Tokens that stand in the shared prefix: what sharing to the token would not compute."""
    packs: int = 0
    seconds: float = 0.0
    """At work; waiting for another call's turn is not."""
    out_of_memory: int = 0
    """Times the token budget was halved."""

    def add(self, other: Work) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))


@dataclass
class Pooled:
    """Result of one call of a backend.

    vectors: float32 [N, D] on the model's device; zero where the row failed
    failed:  row number -> why it could not be computed
    """

    vectors: torch.Tensor
    failed: dict[int, str] = field(default_factory=dict)
    work: Work = field(default_factory=Work)
