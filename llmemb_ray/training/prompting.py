"""The texts of a batch as token sequences, by the representation that the trained model embeds with.

Invariant: a text of a batch has the tokens that ``llmemb embed`` gives it under its row's instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import InputError
from llmemb_ray.representation import Prompter, Representation, Role, TokenRows
from llmemb_ray.representation.representation import Form
from llmemb_ray.representation.templates import e5_query
from llmemb_ray.training.batches import Batch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

INSTRUCTED = "Instruct: "

KEPT = 4096
"""Prompters at once: synthetic data have an instruction of their own for every few rows."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """rows: the sequences of all texts of a batch, anchors first, then positives, then negatives row by row."""

    rows: TokenRows
    anchors: int
    positives: int
    negatives: int
    """Of a row."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return self.rows.lengths


class Prompting:
    """Prompters by instruction, made when they are first needed.

    text_tokens: texts are cut to so many tokens before the prompt
    """

    def __init__(self, spec: EmbedderSpec, *, text_tokens: int | None = None) -> None:
        self._spec, self._text_tokens = spec, text_tokens
        self._takes_instructions = takes_instructions(spec.representation)
        self._prompters: dict[tuple[str | None, bool, Role], Prompter] = {}

    def prompter(self, role: Role, instruction: str | None = None, *, symmetric: bool = False) -> Prompter:
        takes = self._takes_instructions
        key = instruction if takes else None, symmetric and takes, role
        made = self._prompters.get(key)
        if made is None:
            if len(self._prompters) >= KEPT:
                self._prompters = {}
            representation = under(self._spec.representation, key[0], symmetric=key[1])
            made = self._prompters[key] = replace(self._spec, representation=representation).prompter(role)
        return made

    def of(self, batch: Batch) -> Prompts:
        """Raises InputError naming the row of a text that has no tokens."""
        of_each = len(batch.negatives[0]) if batch.negatives else 0
        numbers = range(len(batch.anchors))
        of_positives = range(len(batch.positives))
        of_negatives = [number for number in numbers for _ in range(of_each)]
        negatives = [text for row in batch.negatives for text in row]
        anchors = self._of_rows("query", batch, batch.anchors, numbers)
        others = self._of_rows("document", batch, [*batch.positives, *negatives], [*of_positives, *of_negatives])
        return Prompts(rows=TokenRows.from_lists(anchors + others), anchors=len(numbers), positives=len(of_positives), negatives=of_each)

    def _of_rows(self, role: Role, batch: Batch, texts: Sequence[str], rows: Sequence[int]) -> list[npt.NDArray[np.int32]]:
        """The sequences of texts of some rows, each under its row's instruction."""
        groups: dict[str | None, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(batch.instructions[row] if self._takes_instructions else None, []).append(place)
        made: dict[int, npt.NDArray[np.int32]] = {}
        for instruction, places in groups.items():
            prompter = self.prompter(role, instruction, symmetric=batch.symmetric)
            tokens = self.tokens(prompter, [texts[place] for place in places], [batch.sources[rows[place]] for place in places])
            made |= {place: tokens[number] for number, place in enumerate(places)}
        return [made[place] for place in range(len(texts))]

    def tokens(self, prompter: Prompter, texts: Sequence[str], sources: Sequence[str] | None = None) -> TokenRows:
        """Raises InputError at a text that cannot be embedded."""
        cut = list(texts)
        if self._text_tokens is not None:
            for number, offsets in enumerate(prompter.text_offsets(cut)):
                if len(offsets) > self._text_tokens:
                    cut[number] = cut[number][: int(offsets[self._text_tokens - 1, 1])]
        rows, unfit = prompter.tokenize(cut)
        for number, problem in enumerate(unfit):
            if problem is not None:
                where = sources[number] if sources else f"text {number}"
                raise InputError(f"{where}: {texts[number][:60]!r} cannot be embedded: {problem}; leave the row out")
        return rows


def takes_instructions(representation: Representation) -> bool:
    """Whether its queries are prompts of paper 2, with or without an instruction."""
    return representation.query.template.startswith(INSTRUCTED) or (
        representation.append_eos and representation.query == Form(clean=representation.query.clean)
    )


def under(representation: Representation, instruction: str | None, *, symmetric: bool = False) -> Representation:
    """The representation with another instruction for its queries; symmetric: for its documents too."""
    if instruction is None:
        return replace(representation, document=representation.query) if symmetric else representation
    query = Form(template=e5_query(instruction), clean=representation.query.clean)
    return replace(representation, query=query, document=query if symmetric else representation.document)
