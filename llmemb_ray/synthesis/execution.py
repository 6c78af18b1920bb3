"""Who answers the requests of a run: one generator that this process asks, or actors on Ray that each hold one.

Invariant: both ask the same requests of the same unit and write through ``units.write``. In this process requests of several units are
under way at once, and each answer is kept until its unit is committed, so that what was paid for is not asked again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Container, Iterable, Iterator
from collections.abc import Generator as Generating
from dataclasses import dataclass
from typing import Protocol

from llmemb_ray.generation import answers
from llmemb_ray.generation.answers import Answers
from llmemb_ray.generation.generator import Answer, Generator, Prompt
from llmemb_ray.storage import Storage, is_temporary
from llmemb_ray.synthesis.commits import Made
from llmemb_ray.synthesis.drawing import Request
from llmemb_ray.synthesis.spending import Spending
from llmemb_ray.synthesis.units import Unit, Work, write

ANSWERS = "_llmemb/answers"
"""Directory of answers to requests of units that are not committed yet."""


@dataclass(frozen=True)
class Outcome:
    """Of one unit: its commit, or why it has none."""

    unit: str
    made: Made | None
    error: str | None = None


class Execution(Protocol):
    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        """(number of the prompt, answer), in any order: of the brainstorming."""

    def run(self, work: Work, units: Iterable[Unit]) -> Generating[Outcome, None, None]:
        """What became of each unit; closed, it asks no more."""

    def stop(self) -> None:
        """Begins no more units; those begun are still finished."""

    def at_work(self) -> bool:
        """Whether units are begun that are not committed yet, for all that is known."""

    def live(self) -> tuple[int, int, int]:
        """(requests answered, tokens, generators at work) by this command."""


@dataclass
class _Open:
    """A unit with requests under way."""

    unit: Unit
    requests: list[Request]
    kept: Answers
    answers: dict[int, Answer]
    began: float
    unanswered: int = 0
    problem: str = ""
    """Of the last request that nobody answered."""

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way or to be asked."""
        return len(self.answers) + self.unanswered == self.unit.rows


class InProcess:
    """One generator, asked from here."""

    def __init__(self, generator: Generator, spending: Spending) -> None:
        self._generator, self._spending = generator, spending
        self._rows = self._tokens = 0
        self._stopping = self._at_work = False

    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Answer]]:
        numbered = self._spending.within(prompts)
        for number, answer in self._generator.generate(numbered):
            self._tokens += answer.prompt_tokens + answer.completion_tokens
            self._spending.add(answer)
            yield number, answer

    def run(self, work: Work, units: Iterable[Unit]) -> Generating[Outcome, None, None]:
        """A unit with a request that nobody answered has no commit; its other answers are kept."""
        asked: dict[int, tuple[_Open, int]] = {}
        ready: list[_Open] = []
        opened: dict[str, _Open] = {}

        def prompts() -> Iterator[Prompt]:
            number = 0
            for unit in itertools.takewhile(lambda _: not self._stopping, units):
                one = self._open(work, unit)
                opened[unit.name] = one
                self._at_work = True
                if len(one.answers) == unit.rows:
                    ready.append(one)
                    continue
                for request in one.requests:
                    if request.row not in one.answers:
                        asked[number] = one, request.row
                        number += 1
                        yield work.prompt(request)

        try:
            for number, answer in self._generator.generate(self._spending.within(prompts())):
                one, row = asked.pop(number)
                self._tokens += answer.prompt_tokens + answer.completion_tokens
                self._spending.add(answer)
                if answer.passing:
                    one.unanswered += 1
                    one.problem = f"request {row}: {answer.problem}"
                else:
                    self._rows += 1
                    one.kept.add(work.generator, str(row), answer)
                    one.answers[row] = answer
                if one.ended:
                    ready.append(one)
                while ready:
                    yield self._end(work, opened.pop(ready.pop().unit.name))
            while ready:
                yield self._end(work, opened.pop(ready.pop().unit.name))
            yield from (Outcome(name, None, one.problem) for name, one in opened.items() if one.unanswered)
        finally:
            self._at_work = False
            for one in list(opened.values()):
                one.kept.close()

    def _open(self, work: Work, unit: Unit) -> _Open:
        kept = Answers(f"{work.output.url}/{ANSWERS}/{unit.name}.jsonl", work.output.access)
        requests = work.requests(unit)
        found = {request.row: kept.get(work.generator, str(request.row)) for request in requests}
        answers = {row: answer for row, answer in found.items() if answer is not None}
        self._rows += len(answers)
        return _Open(unit, requests, kept, answers, time.time())

    def _end(self, work: Work, one: _Open) -> Outcome:
        one.kept.close()
        if one.unanswered:
            return Outcome(one.unit.name, None, one.problem)
        made = write(work, one.unit, one.requests, [one.answers[request.row] for request in one.requests], began=one.began)
        work.output.delete([f"{ANSWERS}/{one.unit.name}.jsonl"])
        return Outcome(one.unit.name, made)

    def stop(self) -> None:
        self._stopping = True

    def at_work(self) -> bool:
        return self._at_work

    def live(self) -> tuple[int, int, int]:
        return self._rows, self._tokens, 1


def kept_tokens(output: Storage, committed: Container[str]) -> tuple[int, int]:
    """(prompt tokens, tokens of answers) of the answers that are kept for units without a commit. committed: names of the others."""
    paths = [entry.path for entry in output.list(ANSWERS) if not is_temporary(entry.path)]
    waiting = [path for path in paths if path.removeprefix(f"{ANSWERS}/").removesuffix(".jsonl") not in committed]
    return answers.tokens(answer for path in waiting for answer in answers.read(output, path).values())
