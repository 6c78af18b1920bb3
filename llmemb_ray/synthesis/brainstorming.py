"""Filling the task pool: the user's own tasks, then those that a generator thinks of, family by family.

Invariant: the pool follows from the tasks given, the seed, the prompts and the answers by number of call, not from the order in which they
came. Answers are kept as they come, so nothing is asked twice. Each family is asked for a bounded number of times.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from llmemb_ray.errors import ConfigError, NotFound, OutputError, RunFailed
from llmemb_ray.generation import answers
from llmemb_ray.generation.answers import Answers
from llmemb_ray.generation.generator import Answer, Prompt
from llmemb_ray.storage import Storage
from llmemb_ray.synthesis import tasks
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.tasks import Brainstorm, NoTasks, Pool, Task

PATH = "tasks.jsonl"
ACCOUNTS = "_llmemb/tasks.json"
ANSWERS = "_llmemb/brainstorm.jsonl"

TASKS_AN_ANSWER = 20
"""That a prompt asks for."""

CALLS = 3
"""Times as many calls as would do if no task came twice, and a few more, are made at most."""

Ask = Callable[[Sequence[Prompt]], Iterator[tuple[int, Answer]]]


@dataclass(frozen=True, kw_only=True)
class Brainstorming:
    """The accounts of a pool; stands in OUT/_llmemb/tasks.json."""

    made_of: dict[str, Any]
    """What decides it."""
    digest: str
    """Of the pool as it was written."""
    calls: int
    answers: dict[str, int]
    """Calls by what came of them: ok, or why there were no tasks."""
    tasks: dict[str, int]
    """By family, the user's own among them."""
    prompt_tokens: int
    completion_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield f"tasks: {', '.join(f'{count:,} {family}' for family, count in self.tasks.items()) or 'none'}"
        failed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.answers.items()) if reason != "ok")
        if self.calls:
            yield f"{self.calls:,} calls{f', of which {failed}' if failed else ''}; {self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} of answers"


@dataclass(frozen=True, kw_only=True)
class Brief:
    """What a pool is made of. families: those that need tasks; given: the user's tasks; each: tasks to brainstorm for a family."""

    families: tuple[str, ...]
    given: tuple[Task, ...]
    each: int
    seed: int
    prompts: Prompts

    def identity(self, generator: str) -> dict[str, Any]:
        given = hashlib.sha256(json.dumps([[task.family, task.task] for task in self.given]).encode()).hexdigest()
        made: dict[str, Any] = {"families": list(self.families), "given": given, "each": self.each}
        if self.each and self.families:
            made |= {"seed": self.seed, "generator": generator, "prompts": {family: self.prompts.brainstorm[family] for family in self.families}}
        return made

    @property
    def most_calls(self) -> int:
        """For each family."""
        return CALLS * math.ceil(self.each / TASKS_AN_ANSWER) + 2 if self.each else 0


def accounts(output: Storage) -> Brainstorming | None:
    """None where no pool was made. Raises OutputError."""
    try:
        return Brainstorming(**json.loads(output.read(ACCOUNTS)))
    except NotFound:
        return None
    except (ValueError, TypeError) as error:
        raise OutputError(f"{output.display(ACCOUNTS)} holds no accounts of this version: {error}") from error


def standing(output: Storage, identities: Sequence[dict[str, Any]]) -> Pool | None:
    """The pool in OUT, with what its user changed in it; None where it is to be made.

    identities: what it may be made of. Raises ConfigError where the user changed a pool that would now be made otherwise.
    """
    made = accounts(output)
    if made is None:
        if output.exists(PATH):
            raise ConfigError(f"{output.display(PATH)} is from no brainstorming here; move it away and name it with --tasks")
        return None
    if not output.exists(PATH):
        return None
    pool = Pool(tasks.read_file(f"{output.url}/{PATH}", output.access))
    if made.made_of in identities:
        return pool
    if pool.digest != made.digest:
        raise ConfigError(
            f"{output.display(PATH)} was edited, and the settings that it was made with have changed: to keep it, "
            "copy it and name the copy with --tasks; then remove it"
        )
    return None


def fill(brief: Brief, output: Storage, generator: str, ask: Ask, *, schema: dict[str, Any] | None, say: Callable[[str], None]) -> Pool:
    """Makes the pool and writes it with its accounts. ask: answers some prompts; fewer if it was stopped. Raises RunFailed."""
    pool = Pool(brief.given)
    came: Counter[str] = Counter()
    tokens = [0, 0]
    with closing(Answers(f"{output.url}/{ANSWERS}", output.access)) as kept:
        added, calls = dict.fromkeys(brief.families, 0), dict.fromkeys(brief.families, 0)
        while wanted := list(_calls(brief, added, calls)):
            came_in = _answers(wanted, generator, kept, ask, schema)
            for call in wanted:
                answer = came_in[_key(call)]
                tokens[0] += answer.prompt_tokens
                tokens[1] += answer.completion_tokens
                calls[call.family] += 1
                found = _tasks(answer)
                came["ok" if isinstance(found, tuple) else found.reason] += 1
                for text in found if isinstance(found, tuple) else ():
                    if added[call.family] < brief.each:
                        added[call.family] += pool.add(Task(family=call.family, task=text, source=f"{generator}, call {call.call}"))
            say(f"tasks: {', '.join(f'{count:,} of {brief.each:,} {family}' for family, count in added.items())}")
    told = ", ".join(f"{count:,} {reason}" for reason, count in came.items())
    if empty := [family for family in brief.families if not pool.of(family)]:
        raise RunFailed(
            f"brainstorming gave no task of family {' and '.join(empty)} in {max(calls.values())} calls each ({told}); the answers stand in "
            f"{output.display(ANSWERS)}. Try another generator or --structured, name tasks with --tasks, or give the family no weight"
        )
    for family, count in added.items():
        if count < brief.each:
            say(f"note: {count:,} of {brief.each:,} tasks of {family} came in {calls[family]:,} calls; more would hardly come ({told})")
    by_family = {family: len(pool.of(family)) for family in brief.families}
    made_of = brief.identity(generator)
    made = Brainstorming(
        made_of=made_of, digest=pool.digest, calls=sum(came.values()), answers=dict(came), tasks=by_family, prompt_tokens=tokens[0], completion_tokens=tokens[1]
    )
    output.delete([PATH])  # Stopped from here on, the pool is made anew of the answers that are kept, and never taken for one that was edited.
    output.put(ACCOUNTS, json.dumps(made.to_dict(), indent=1, ensure_ascii=False).encode())
    output.put(PATH, pool.to_lines())
    return pool


def kept_tokens(output: Storage) -> tuple[int, int]:
    """(prompt tokens, tokens of answers) of all answers that were kept, used or not."""
    return answers.tokens(answers.read(output, ANSWERS).values())


def _calls(brief: Brief, added: dict[str, int], calls: dict[str, int]) -> Iterator[Brainstorm]:
    """Of the next round: as many as what is missing needs, if each answer were whole and new."""
    for family in brief.families:
        missing = brief.each - added[family]
        number = min(math.ceil(missing / TASKS_AN_ANSWER), brief.most_calls - calls[family])
        yield from (tasks.brainstorm(brief.prompts, brief.seed, family, calls[family] + place) for place in range(number))


def _answers(wanted: Iterable[Brainstorm], generator: str, kept: Answers, ask: Ask, schema: dict[str, Any] | None) -> dict[str, Answer]:
    found = {_key(call): kept.get(generator, _key(call)) for call in wanted}
    missing = [call for call in wanted if found[_key(call)] is None]
    failed = ""
    if missing:
        for number, answer in ask([Prompt(text=call.prompt, schema=schema, seed=call.seed) for call in missing]):
            if answer.passing:
                failed = answer.problem or "no answer"
                continue
            kept.add(generator, _key(missing[number]), answer)
            found[_key(missing[number])] = answer
    if unanswered := sum(answer is None for answer in found.values()):
        raise RunFailed(f"brainstorming: {unanswered} of {len(found)} calls had no answer{f': {failed}' if failed else ''}; the same command asks these again")
    return {key: answer for key, answer in found.items() if answer is not None}


def _key(call: Brainstorm) -> str:
    prompt = hashlib.sha256(call.prompt.encode()).hexdigest()[:16]
    return f"{call.family} {call.call} {call.seed} {prompt}"


def _tasks(answer: Answer) -> tuple[str, ...] | NoTasks:
    if answer.text is None:
        return NoTasks(reason="refused", detail=answer.problem or "no answer")
    if answer.cut:
        return NoTasks(reason="cut", detail="the limit of new tokens ended it")
    found = tasks.read_answer(answer.text)
    return found if isinstance(found, NoTasks) else found.tasks
