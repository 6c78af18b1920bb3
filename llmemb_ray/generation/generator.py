"""What gives answers to prompts: one interface for endpoints and for models of one's own.

Invariant: each prompt is answered once, with a text or with the reason why there is none. Answers come as they are ready,
in any order. A generator keeps nothing on disk and knows not what the answers are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Structured = Literal["json_schema", "json_object", "none"]
"""What holds an answer to the schema of its prompt: all of the schema; that it is some JSON object; nothing."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one answer is asked for."""

    text: str
    schema: Mapping[str, Any] | None = None
    """JSON schema that the answer must follow, as far as the generator's ``structured`` enforces it; None for free text."""
    seed: int | None = None
    """Of the answer's sampling, 0 ≤ seed < 2**63; None for one that cannot be made again. Without effect at temperature 0."""
    max_new_tokens: int | None = None
    """Of the answer; None for the generator's own limit."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer, or why there is none."""

    text: str | None = None
    problem: str | None = None
    """Why there is no text."""
    passing: bool = False
    """With a problem: whether asking again later may help, as after an overload. A refusal stays one."""
    cut: bool = False
    """Whether the text was ended by the limit of new tokens."""
    continues: bool = False
    """Whether the text goes on from the prompt's last character (a base model) and is no reply to it."""
    prompt_tokens: int = 0
    """As the model's own tokenizer counts, if it is told."""
    completion_tokens: int = 0
    retries: int = 0
    """Requests for this prompt that failed before the one that is reported."""


class Generator(Protocol):
    """Something that answers prompts."""

    @property
    def name(self) -> str:
        """Whom is asked, with every setting that decides an answer: equal names give interchangeable answers. Holds no secret."""

    def generate(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        """(number of the prompt, answer) as they come; ``prompts`` is read as there is room, and may be long.

        Raises ConfigError for what no prompt can succeed with (key, model, address), RunFailed where it went on failing.
        """
