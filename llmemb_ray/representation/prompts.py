"""From texts to token sequences: the template filled in, the whole prompt tokenised at once, the text cut to fit.

Invariant: the tokens of a row are those of its whole prompt (byte-pair merges cross the border between
template and text), and a prompt that is too long loses the end of its *text*, never of its template.
This module needs only the ``tokenizers`` library; it knows no model and no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
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

EXTENDED_CHECKED = 32
"""Rows that ``Prompter.extend`` compares with their whole prompt's tokens each time it is called."""


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


@lru_cache(maxsize=8)
def _tokenizer(serialised: str) -> Any:
    """Parsed once for all prompters of a model, without truncation and padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=256)
def _never_one_token(serialised: str, before: str, after: str) -> bool:
    """Whether no token holds these two characters, as the vocabulary spells them, side by side: then every tokenisation parts them."""
    tokenizer = _tokenizer(serialised)
    if type(tokenizer.model).__name__ not in ("BPE", "Unigram") or getattr(tokenizer.model, "continuing_subword_prefix", None):
        return False
    return not any(before + after in piece for piece in tokenizer.get_vocab(with_added_tokens=True))


class Prompter:
    """Turns texts of one role into token sequences.

    tokenizer_json: a fast tokenizer as the ``tokenizers`` library serialises it.
    eos_id:         id of the EOS token, needed where the representation appends it.
    Raises ConfigError if the template leaves no room for a token of text.
    """

    def __init__(self, representation: Representation, role: Role, *, tokenizer_json: str, eos_id: int | None) -> None:
        if representation.max_tokens is None:
            raise ConfigError("max_tokens: not settled; settle it against the model first")
        self.representation, self.role = representation, role
        self.max_tokens = representation.max_tokens
        self._form = representation.form(role)
        self._before, self._after = templates.split(self._form.template)
        self._serialised = tokenizer_json
        self._tokenizer = _tokenizer(tokenizer_json)
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

    def extend(self, base: Prompter, rows: TokenRows, texts: Sequence[str]) -> tuple[TokenRows, list[Unfit | None], int]:
        """What ``tokenize(texts)`` gives, made from the ``rows`` that ``base.tokenize(texts)`` gave; and how many texts were tokenised again for it.

        base: of this template without what it begins with, such as demonstrations. The tokens up to a border inside the template are put in
        front of what follows it in each row. A border serves if no token of the vocabulary reaches over it, so that every tokenisation of every
        prompt has it; some rows are compared with their whole prompt besides. Rows that were cut or are too long now are tokenised again, and
        all of them where there is no such border.
        """
        seam = self._seam(base)
        joined: list[IntArray | None] = [None] * len(texts)
        if seam is not None:
            head, cut = seam
            beginning, start = base._tokenizer.encode(base.prompt(PROBES[0])).ids[:cut], np.asarray(head, np.int32)
            fits = ~rows.truncated & (rows.lengths > cut) & (rows.lengths - cut + len(start) <= self.max_tokens)
            for position, token in enumerate(beginning):
                fits[fits] = rows.ids[rows.offsets[:-1][fits] + position] == token
            for row in np.flatnonzero(fits).tolist():
                joined[row] = np.concatenate([start, rows[row][cut:]])
            sample = _unusual(rows, np.flatnonzero(fits), cut + 1)
            whole, _ = self.tokenize([texts[row] for row in sample])
            if any(not np.array_equal(whole[place], joined[row]) for place, row in enumerate(sample)):  # type: ignore[arg-type]
                joined = [None] * len(texts)
        again = [row for row, ids in enumerate(joined) if ids is None]
        rest, problems = self.tokenize([texts[row] for row in again])
        truncated = np.zeros(len(texts), np.bool_)
        unfit: list[Unfit | None] = [None] * len(texts)
        for place, row in enumerate(again):
            joined[row], truncated[row], unfit[row] = rest[place], rest.truncated[place], problems[place]
        return TokenRows.from_lists(joined, truncated.tolist()), unfit, len(again)

    def _seam(self, base: Prompter) -> tuple[list[int], int] | None:
        """(the tokens before a sure border, how many tokens of ``base``'s prompts they stand for), the border inside what both templates have."""
        if base._serialised != self._serialised or (base._after, base._form.clean, base._eos) != (self._after, self._form.clean, self._eos):
            return None
        if not self._before.endswith(base._before):
            return None
        probes = [base._tokenizer.encode(base.prompt(probe)).ids for probe in PROBES]
        theirs, ours = probes[0], self._tokenizer.encode(self.prompt(PROBES[0])).ids
        fixed = next(count for count in range(len(theirs) + 1) if len({tuple(probe[: count + 1]) for probe in probes}) > 1)
        shared = next((count for count, (a, b) in enumerate(zip(theirs[::-1], ours[::-1], strict=False)) if a != b), min(len(theirs), len(ours)))
        more = len(ours) - len(theirs)
        for cut in range(fixed - 1, max(len(theirs) - shared, 1) - 1, -1):
            after = self._spelling(theirs[cut])
            sides = [(self._spelling(left), after) for left in (theirs[cut - 1], ours[cut - 1 + more])]
            if all(left and right and _never_one_token(self._serialised, left[-1], right[0]) for left, right in sides):
                return ours[: cut + more], cut
        return None

    def _spelling(self, token: int) -> str:
        """A token as the vocabulary spells it; empty if that is no spelling (a special token, a lone byte)."""
        piece = self._tokenizer.id_to_token(token) or ""
        added = token in self._tokenizer.get_added_tokens_decoder()
        return "" if added or (piece.startswith("<0x") and piece.endswith(">")) else piece

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


def _unusual(rows: TokenRows, among: npt.NDArray[np.int64], position: int) -> list[int]:
    """At most EXTENDED_CHECKED of the rows: half with the rarest tokens at ``position``, half spread evenly over all."""
    if not len(among):
        return []
    tokens = rows.ids[np.minimum(rows.offsets[:-1] + position, rows.offsets[1:] - 1)[among]]
    _, kinds, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    rare = among[np.argsort(counts[kinds], kind="stable")[: EXTENDED_CHECKED // 2]]
    spread = among[np.linspace(0, len(among) - 1, EXTENDED_CHECKED // 2).astype(np.int64)]
    return sorted({*rare.tolist(), *spread.tolist()})
