"""Sampling and JSON schemas in transformers' own generation, row by row.

Invariant: the tokens of a row depend on its own logits, its seed and its schema, and on nothing that is batched with it. A token
is drawn exactly from the softmax of logits / temperature, within the nucleus: the largest of these values plus Gumbel noise is
such a draw, and the noise is the row's own. The schema is enforced first, so that what it forbids takes no probability.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from llmemb_ray.errors import ConfigError
from llmemb_ray.generation.generator import Prompt, Structured

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

COMPACT: JsonCompileOptions = {"whitespace_flexible": False}
"""Of JSON: without white space between its parts, of which a model may else make any amount."""


class Schemas:
    """Grammars of JSON schemas over one vocabulary. Raises ConfigError for a tokenizer that they cannot be laid over."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], vocabulary: int, structured: Structured) -> None:
        """ends: tokens that end an answer; vocabulary: size of the logits of a token"""
        import llguidance.hf

        self._structured = structured
        self._grammars: dict[str, str] = {}
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=list(ends) or None)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"structured: the model's tokenizer cannot be held to a schema: {error}; set structured none") from error

    def grammar(self, schema: Mapping[str, Any]) -> str:
        """Of a schema, as llguidance writes it. Raises ConfigError for one that is not supported, or that the vocabulary cannot spell."""
        from llguidance import LLMatcher

        text = json.dumps(ANY_OBJECT if self._structured == "json_object" else schema)
        if text not in self._grammars:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=COMPACT)
            problem = LLMatcher.validate_grammar(grammar, self._tokens)
            if problem:
                raise ConfigError(f"structured: the JSON schema {text[:200]} cannot be followed: {problem}; set structured json_object, or none")
            first = LLMatcher(self._tokens, grammar, log_level=0)
            if not any(first.validate_tokens([token]) for token in np.flatnonzero(_bits(first)).tolist()):  # It may offer <unk> for want of others.
                raise ConfigError("structured: the model's vocabulary has no token that its JSON could begin with; set structured none, or take another model")
            self._grammars[text] = grammar
        return self._grammars[text]

    def matcher(self, schema: Mapping[str, Any]) -> Any:
        """What tells, token by token, which may come next. Raises ConfigError as ``grammar``."""
        from llguidance import LLMatcher

        return LLMatcher(self._tokens, self.grammar(schema), log_level=0)


class RowSampling:
    """A logits processor of transformers, for one batch: the token that is to come next has the largest value, so that greedy decoding takes it."""

    def __init__(self, prompts: Sequence[Prompt], matchers: Sequence[Any], *, prompt_length: int, temperature: float, top_p: float) -> None:
        """matchers: of the rows, None for one without a schema; prompt_length: of the padded prompts in tokens"""
        self._matchers = list(matchers)
        self._prompt_length, self._temperature, self._top_p = prompt_length, temperature, top_p
        self._generators = [torch.Generator() for _ in prompts] if temperature else []
        for generator, prompt in zip(self._generators, prompts, strict=False):
            if prompt.seed is None:
                generator.seed()
            else:
                generator.manual_seed(prompt.seed)
        self.problems: dict[int, str] = {}
        """Of rows whose schema could not be followed any further."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T], scores [B, V]: new ones, in float32"""
        values_BV = scores.float().clone()
        for row, matcher in enumerate(self._matchers):
            if matcher is not None:
                self._hold(row, matcher, input_ids[row], values_BV[row])
        if self._temperature:
            values_BV /= self._temperature
            if self._top_p < 1:
                values_BV = _nucleus(values_BV, self._top_p)
            values_BV += self._noise(values_BV)
        return values_BV

    def _hold(self, row: int, matcher: Any, ids_T: torch.Tensor, values_V: torch.Tensor) -> None:
        """Leaves only tokens that the row's schema allows."""
        if matcher.is_error():
            return
        if len(ids_T) > self._prompt_length and not matcher.is_stopped():
            matcher.consume_token(int(ids_T[-1]))
        if matcher.is_error():
            self.problems[row] = str(matcher.get_error()).strip().splitlines()[0]
            return
        bits = _bits(matcher)[: len(values_V)]
        allowed_V = torch.from_numpy(bits.astype(bool)).to(values_V.device)
        values_V[: len(bits)].masked_fill_(~allowed_V, -torch.inf)
        values_V[len(bits) :] = -torch.inf

    def _noise(self, values_BV: torch.Tensor) -> torch.Tensor:
        """Standard Gumbel noise [B, V]; made on the CPU, so that it is the same on every device."""
        tiny = torch.finfo(torch.float32).tiny
        rows = [torch.empty(values_BV.shape[1]).exponential_(generator=generator).clamp_min(tiny) for generator in self._generators]
        return -torch.stack(rows).log().to(values_BV.device)


def _bits(matcher: Any) -> npt.NDArray[np.uint8]:
    """[V, or a little more]: 1 for each token that may come next."""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")


def _nucleus(values_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Without the tokens beyond the fewest likely ones whose probabilities add up to ``top_p``."""
    ordered_BV, places_BV = values_BV.sort(dim=-1, descending=True, stable=True)
    likely_BV = ordered_BV.softmax(-1)
    beyond_BV = likely_BV.cumsum(-1) - likely_BV >= top_p
    return torch.full_like(values_BV, -torch.inf).scatter(-1, places_BV, ordered_BV.masked_fill(beyond_BV, -torch.inf))
