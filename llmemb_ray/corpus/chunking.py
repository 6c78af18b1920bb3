"""Cutting long texts into chunks, at the ends of sentences where there are some, else between words.

Invariant: chunks are character ranges of the source text, in order, and together hold all of it but white
space at their ends; a chunk has at most ``tokens`` tokens of text (tokenised by itself it can have a few
more, where a merge crossed its border).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]»]*\s+|[。！？｡]+[」』”’）]*\s*|\n\s*\n\s*|\n")

LEAST_FILLED = 0.25
"""Share of its tokens that a chunk has at least when it ends with a sentence; with less it ends between words."""

Span = tuple[int, int]
"""First and last+1 character."""


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """tokens: of a chunk at most; overlap: repeated from the chunk before; pool: one vector a chunk, or their mean."""

    tokens: int
    overlap: int = 0
    pool: str = "none"


def chunks(text: str, offsets: npt.NDArray[np.int64], chunking: Chunking) -> list[Span]:
    """The chunks of one text. offsets: int64 [T, 2], the characters of each of its tokens.

    A text of no more than ``chunking.tokens`` tokens is one chunk, untouched.
    """
    count = len(offsets)
    if count <= chunking.tokens:
        return [(0, len(text))]
    starts = np.maximum.accumulate(offsets[:, 0])
    starts[0] = 0  # Whatever the tokenizer's normaliser leaves out before the first token is still text.
    sentences, words = _borders(text, starts, offsets[:, 1])
    found: list[Span] = []
    first = 0
    while first < count:
        limit = first + chunking.tokens
        border = _latest(sentences, first + int(LEAST_FILLED * chunking.tokens), limit) or _latest(words, first, limit) or limit
        last = count if limit >= count else border
        span = _trimmed(text, int(starts[first]), int(starts[last]) if last < count else len(text))
        if span is not None:
            _add(found, span)
        if last == count:
            break
        first = _next(first, last, chunking.overlap, sentences, words)
    return found or [(0, len(text))]


def _add(found: list[Span], span: Span) -> None:
    """Appends a span that goes on behind the last one; where white space made them begin alike, it takes that one's place."""
    if found and span[1] <= found[-1][1]:
        return
    if found and span[0] <= found[-1][0]:
        found.pop()
    found.append(span)


def _next(first: int, last: int, overlap: int, sentences: npt.NDArray[np.int64], words: npt.NDArray[np.int64]) -> int:
    """The token that the next chunk begins with: a border within the overlap, the earliest there is."""
    least = last - overlap
    if overlap == 0 or least <= first:
        return last
    return _earliest(sentences, least, last) or _earliest(words, least, last) or least


def _borders(text: str, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(tokens that begin a sentence, tokens that begin a word), in order, the first token left out.

    A token may bring the white space before its word along; what counts is where its first other character stands.
    """
    space = np.fromiter((character.isspace() for character in text), np.bool_, len(text))
    following = np.where(space, len(text), np.arange(len(text)))
    following = np.append(np.minimum.accumulate(following[::-1])[::-1], len(text))
    first = following[starts]
    begins = (first < ends) & (first > 0)
    after_space = begins & space[np.maximum(first, 1) - 1]
    after_sentence = begins & np.isin(first, np.fromiter((match.end() for match in _SENTENCE_END.finditer(text)), np.int64))
    return np.flatnonzero(after_sentence), np.flatnonzero(after_space | after_sentence)


def _latest(borders: npt.NDArray[np.int64], above: int, up_to: int) -> int:
    """The last border in ``(above, up_to]``, or 0."""
    place = int(np.searchsorted(borders, up_to, side="right")) - 1
    return int(borders[place]) if place >= 0 and borders[place] > above else 0


def _earliest(borders: npt.NDArray[np.int64], least: int, below: int) -> int:
    """The first border in ``[least, below)``, or 0."""
    place = int(np.searchsorted(borders, least, side="left"))
    return int(borders[place]) if place < len(borders) and borders[place] < below else 0


def _trimmed(text: str, start: int, end: int) -> Span | None:
    """The span without white space at its ends; None if nothing is left."""
    piece = text[start:end]
    if not piece.strip():
        return None
    return start + len(piece) - len(piece.lstrip()), end - (len(piece) - len(piece.rstrip()))
