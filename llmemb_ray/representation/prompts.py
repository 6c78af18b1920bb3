"""From texts to token sequences: the template filled in, the whole prompt tokenised at once, the text cut to fit.

Invariant: the tokens of a row are those of its whole prompt (byte-pair merges cross the border between
template and text), and a prompt that is too long loses the end of its *text*, never of its template.
This module needs only the ``tokenizers`` library; it knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from llmemb_ray.errors import ConfigError
from llmemb_ray.representation import templates
from llmemb_ray.representation.cleaning import clean
from llmemb_ray.representation.representation import Representation, Role

IntArray = npt.NDArray[np.int32]

ENCODE_ROWS = 4096
"""Rows handed to the tokenizer at once; bounds what its Python results hold."""

OFFSETS_CHARACTERS = 2**20
"""Characters handed to the tokenizer at once where offsets are wanted, which take some forty bytes a character."""

FIRST_WINDOW_CHARACTERS_PER_TOKEN = 8
"""A text much longer than the token limit is first cut to so many characters a token, so that ten
megabytes are not tokenised for five hundred tokens; the window doubles while the prompt still fits."""

PROBES = ("The", "a", "In", "how", "I")
"""Beginnings of ordinary texts. The prefix they share is what most rows share; a row that merges
otherwise at the border shares fewer tokens (see ``TokenRows.shared``)."""

MIN_SHARED_TOKENS = 4
"""A shorter common prefix is computed with each row: sharing a lone BOS token saves nothing."""


@dataclass(frozen=True)
class TokenRows:
    """Token sequences laid end to end.

    ids:       int32 [T]    token ids of all rows
    offsets:   int64 [N+1]  row i is ids[offsets[i]:offsets[i+1]]
    truncated: bool  [N]    whether the row's text was cut
    """

    ids: IntArray
    offsets: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]

    @classmethod
    def from_lists(cls, rows: list[Any], truncated: list[bool] | None = None) -> TokenRows:
        lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        ids = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.zeros(0, np.int32)
        return cls(ids, offsets, np.asarray(truncated if truncated is not None else [False] * len(rows), dtype=np.bool_))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> IntArray:
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, rows: Any) -> TokenRows:
        """The rows at these positions, in this order; an empty row for None."""
        none = np.zeros(0, np.int32)
        return TokenRows.from_lists([none if row is None else self[row] for row in rows], [row is not None and bool(self.truncated[row]) for row in rows])

    def shared(self, prefix: IntArray) -> npt.NDArray[np.int64]:
        """int64 [N]: how many leading tokens each row shares with ``prefix``; at least one token stays its own."""
        shared = np.zeros(len(self), np.int64)
        alive = np.ones(len(self), np.bool_)
        for position, token in enumerate(prefix):
            index = self.offsets[:-1] + position
            alive &= index < self.offsets[1:] - 1
            alive[alive] = self.ids[index[alive]] == token
            shared[alive] = position + 1
        shared[shared < MIN_SHARED_TOKENS] = 0
        return shared


class Unfit(ValueError):
    """A text that cannot become a prompt; ``reason`` is the reject's."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Prompter:
    """Turns texts of one role into token sequences.

    tokenizer_json: a fast tokenizer as the ``tokenizers`` library serialises it.
    eos_id:         id of the EOS token, needed where the representation appends it.
    Raises ConfigError if the template leaves no room for a token of text.
    """

    def __init__(self, representation: Representation, role: Role, *, tokenizer_json: str, eos_id: int | None) -> None:
        from tokenizers import Tokenizer

        if representation.max_tokens is None:
            raise ConfigError("max_tokens: not settled; settle it against the model first")
        self.representation, self.role = representation, role
        self.max_tokens = representation.max_tokens
        self._form = representation.form(role)
        self._before, self._after = templates.split(self._form.template)
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._eos: list[int] = []
        self.template_tokens: int
        """Tokens of the prompt of an empty text: what the template takes of ``max_tokens``."""
        if representation.append_eos:
            if eos_id is None:
                raise ConfigError("append_eos: the tokenizer has no EOS token")
            ends_itself = self._tokenizer.encode("a").ids[-1:] == [eos_id]
            self._eos = [] if ends_itself else [eos_id]
        bare = self.template_tokens = len(self._tokenizer.encode(self._before + self._after).ids) + len(self._eos)
        if bare >= self.max_tokens:
            raise ConfigError(
                f"max_tokens: {self.max_tokens} leaves no room for text, the {role} template alone is {bare} tokens; raise max_tokens or shorten the template"
            )

    def text_offsets(self, texts: list[str]) -> Iterator[npt.NDArray[np.int64]]:
        """For each text int64 [T, 2]: first and last+1 character of each of its tokens, tokenised without the template."""
        batch: list[str] = []
        characters = 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if characters >= OFFSETS_CHARACTERS:
                yield from self._offsets(batch)
                batch, characters = [], 0
        yield from self._offsets(batch)

    def _offsets(self, texts: list[str]) -> Iterator[npt.NDArray[np.int64]]:
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            yield np.asarray(encoding.offsets, np.int64).reshape(-1, 2)

    def prompt(self, text: str) -> str:
        """The prompt of a text, before tokenisation and truncation."""
        text = self._before + clean(text, self._form.clean) + self._after
        return text.strip() if self._form.clean == "senteval" else text

    def tokenize(self, texts: list[str]) -> tuple[TokenRows, list[Unfit | None]]:
        """The token sequences of the texts, and for each text that has none (its row is empty) the reason."""
        rows: list[IntArray] = []
        truncated: list[bool] = []
        unfit: list[Unfit | None] = []
        window = self.max_tokens * FIRST_WINDOW_CHARACTERS_PER_TOKEN
        for start in range(0, len(texts), ENCODE_ROWS):
            batch = texts[start : start + ENCODE_ROWS]
            short = [index for index, text in enumerate(batch) if len(text) <= window]
            encoded = iter(self._tokenizer.encode_batch_fast([self.prompt(batch[index]) for index in short]))
            is_short = set(short)
            for index, text in enumerate(batch):
                ids = np.asarray(next(encoded).ids + self._eos, dtype=np.int32) if index in is_short else None
                cut, problem = False, None
                try:
                    if ids is None or len(ids) > self.max_tokens:
                        ids, cut = self._fit(text)
                    if len(ids) == len(self._eos):
                        raise Unfit("no_tokens", "the tokenizer makes no token of this text")
                except Unfit as error:
                    ids, problem = np.zeros(0, np.int32), error
                rows.append(ids)
                truncated.append(cut)
                unfit.append(problem)
        return TokenRows.from_lists(rows, truncated), unfit

    def _fit(self, text: str) -> tuple[IntArray, bool]:
        """The prompt of the longest beginning of ``text`` found to fit, and whether that is less than the whole."""
        room = self.max_tokens - len(self._eos)
        window = self.max_tokens * FIRST_WINDOW_CHARACTERS_PER_TOKEN
        while True:
            piece = text[:window]
            encoding = self._tokenizer.encode(self.prompt(piece))
            if len(encoding.ids) > room:
                break
            if len(piece) == len(text):
                return np.asarray(encoding.ids + self._eos, dtype=np.int32), False
            window *= 2
        start = len(self._before)
        while len(encoding.ids) > room:
            excess = len(encoding.ids) - room
            # Character spans of the tokens that lie in the text, in the prompt's own characters.
            ends = [end for begin, end in encoding.offsets if begin >= start and start < end <= start + len(piece)]
            keep = ends[-excess - 1] - start if excess < len(ends) else 0
            piece = piece[: min(keep, len(piece) - 1)]
            if not piece.strip():
                raise Unfit("no_room", f"nothing but white space, or not one token, of the text fits in max_tokens={self.max_tokens} with its template")
            encoding = self._tokenizer.encode(self.prompt(piece))
        return np.asarray(encoding.ids + self._eos, dtype=np.int32), True

    @cached_property
    def shared_prefix(self) -> IntArray:
        """int32 [P]: the token prefix that ordinary prompts of this role have in common; empty if not worth sharing."""
        probes = [self._tokenizer.encode(self.prompt(probe)).ids for probe in PROBES]
        shortest = min(len(probe) for probe in probes)
        count = 0
        while count < shortest - 1 and len({probe[count] for probe in probes}) == 1:
            count += 1
        return np.asarray(probes[0][:count] if count >= MIN_SHARED_TOKENS else [], dtype=np.int32)
