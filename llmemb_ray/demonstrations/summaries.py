"""Sentences summed up in one word by an LLM that is asked with the template itself (paper 1, section 4.1).

Invariant: a sentence is asked about once; its answer is kept before the next is waited for. Knows no engine: an LLM is a Generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmemb_ray.errors import RunFailed
from llmemb_ray.generation.answers import Answers
from llmemb_ray.generation.generator import Answer, Generator, Prompt
from llmemb_ray.representation.templates import PROMPTEOL, split

SAY_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """answers: of the sentences, in order; asked: how many of them by this command; tokens and retries: of those."""

    answers: list[Answer]
    asked: int
    prompt_tokens: int
    completion_tokens: int
    retries: int


def prompt(sentence: str) -> str:
    """What is asked about a sentence."""
    before, after = split(PROMPTEOL)
    return before + sentence + after


def unanswered(sentences: Sequence[str], asked: str, answers: Answers) -> list[str]:
    """The sentences that have no answer yet."""
    return [sentence for sentence in dict.fromkeys(sentences) if answers.get(asked, prompt(sentence)) is None]


def ask(sentences: Sequence[str], generator: Generator, answers: Answers, say: Callable[[str], None]) -> Asked:
    """Asks about the sentences that have no answer yet.

    Raises RunFailed if some could not be answered for a passing reason; asking again then asks only about those.
    """
    open_ = unanswered(sentences, generator.name, answers)
    count = {"prompt_tokens": 0, "completion_tokens": 0, "retries": 0}
    failed: list[str] = []
    answered, said = 0, time.monotonic()
    if open_:
        for number, answer in generator.generate(Prompt(text=prompt(sentence)) for sentence in open_):
            for name in count:
                count[name] += getattr(answer, name)
            if answer.passing:
                failed.append(str(answer.problem))
                continue
            answers.add(generator.name, prompt(open_[number]), answer)
            answered += 1
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(f"{answered:,} of {len(open_):,} answered" + (f", {count['retries']:,} requests tried again" if count["retries"] else ""))
    if failed:
        raise RunFailed(
            f"{len(failed):,} of {len(open_):,} sentences could not be asked about, the last with: {failed[-1]}; "
            f"the answers are kept in {answers.url}, the same command asks about the others"
        )
    found = [answers.get(generator.name, prompt(sentence)) for sentence in sentences]
    return Asked(answers=[answer for answer in found if answer is not None], asked=answered, **count)
