"""What a run has spent on tokens, and whether one more request fits the budget.

Invariant: a request is let through only while what was spent leaves room for it and those under way, each as dear as the longest prompt and the
longest answer seen; so the budget is overstepped only where requests under way turn out longer than all before, and by no more than that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from llmemb_ray.errors import ConfigError
from llmemb_ray.generation.generator import Answer, Prompt

MILLION = 1e6

CHARACTERS_PER_TOKEN = 4
"""Of English text; prompts are reckoned so until a longer one was told."""


class Spending:
    """price_in, price_out: of a million tokens; None counts nothing. budget: in their currency. spent: (prompt tokens, tokens of answers) before.

    longest_answer: tokens of an answer at most, reckoned with until one came.
    """

    def __init__(self, *, price_in: float | None, price_out: float | None, budget: float | None, spent: tuple[int, int] = (0, 0), longest_answer: int) -> None:
        self._prices = (price_in or 0.0) / MILLION, (price_out or 0.0) / MILLION
        self.priced = price_in is not None or price_out is not None
        self._budget, self._longest = budget, longest_answer
        self._tokens = list(spent)
        self._longest_in = self._longest_out = self._under_way = 0
        self._lock = threading.Lock()
        self.ended = False
        """Whether a request was held back."""

    @property
    def cost(self) -> float:
        return self.of(*self._tokens)

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The cost of so many tokens."""
        return prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]

    def add(self, answer: Answer) -> None:
        """Counts an answer, or a request that had none. Raises ConfigError where there is a budget and no tokens are told."""
        with self._lock:
            self._under_way = max(0, self._under_way - 1)
            if self._budget is not None and answer.text and not (answer.prompt_tokens or answer.completion_tokens):
                raise ConfigError("budget: the endpoint does not tell its tokens, so that it cannot be kept to; leave it out, and bound the run by count")
            self._tokens[0] += answer.prompt_tokens
            self._tokens[1] += answer.completion_tokens
            self._longest_in = max(self._longest_in, answer.prompt_tokens)
            self._longest_out = max(self._longest_out, answer.completion_tokens)

    def within(self, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        """The prompts, until the next one does not fit the budget."""
        for prompt in prompts:
            if not self._take(prompt):
                self.ended = True
                return
            yield prompt

    def _take(self, prompt: Prompt) -> bool:
        with self._lock:
            one = self.of(max(self._longest_in, len(prompt.text) // CHARACTERS_PER_TOKEN), self._longest_out or self._longest)
            if self._budget is not None and self.cost + (self._under_way + 1) * one > self._budget:
                return False
            self._under_way += 1
            return True
