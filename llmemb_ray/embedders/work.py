"""What an embedder has computed, counted in tokens. Plain data: the accounts of a unit are made of it."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
    packs: int = 0
    out_of_memory: int = 0
    """Times the token budget was halved."""

    def add(self, other: Work) -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))
