"""The pool of tasks: what brainstorming answered and what a user adds, each task of a family once.

Invariant: a task is never lost or changed but for white space; of those that differ in case, white space and the last dot alone the first stays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmemb_ray.corpus import rows as corpus_rows
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.storage import Access, redact
from llmemb_ray.synthesis.families import ASYMMETRIC, FAMILIES
from llmemb_ray.synthesis.prompts import Prompts
from llmemb_ray.synthesis.strict import NotStrict, parse

TASK_CHARACTERS = 400
"""Of one task: one sentence. A schema's limit; tasks of a user may be longer."""
MOST_TASKS = 30
"""Of one answer, by the schema; about 20 are asked for."""
SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "minLength": 1, "maxLength": TASK_CHARACTERS},
    "minItems": 1,
    "maxItems": MOST_TASKS,
}
"""JSON schema of an answer to a brainstorming prompt."""

COLUMNS = ("family", "task")


@dataclass(frozen=True, kw_only=True)
class Brainstorm:
    """A request for tasks. seed: 31 bits, of the run's seed, the family and the number of the call alone."""

    family: str
    call: int
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Brainstormed:
    """Tasks as they stood in an answer, white space made single. blank: entries without a letter; repairs: ``fence`` where the list stood in one."""

    tasks: tuple[str, ...]
    blank: int = 0
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NoTasks:
    """An answer that is no list of tasks. reason: not_json, not_text or empty."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """source: where it is from: a file, or the call of a generator."""

    family: str
    task: str
    source: str


def brainstorm(prompts: Prompts, seed: int, family: str, call: int) -> Brainstorm:
    """The request number ``call`` for tasks of an asymmetric family."""
    digest = hashlib.blake2b(f"{seed}/brainstorm/{family}/{call}".encode(), digest_size=8).digest()
    return Brainstorm(family=family, call=call, prompt=prompts.brainstorm[family], seed=int.from_bytes(digest, "big") >> 33)


def read_answer(text: str) -> Brainstormed | NoTasks:
    """The tasks of an answer: a JSON list of strings, and nothing else around it but a code fence."""
    try:
        values, repairs = parse(text)
    except NotStrict as error:
        return NoTasks(reason="not_json", detail=str(error))
    if not isinstance(values, list):
        return NoTasks(reason="not_text", detail=f"{type(values).__name__} is no list")
    for place, value in enumerate(values):
        if not isinstance(value, str) or not corpus_rows.is_unicode(value):
            return NoTasks(reason="not_text", detail=f"entry {place}: {repr(value)[:60]} is no text")
    tasks = tuple(" ".join(value.split()) for value in values if any(character.isalpha() for character in value))
    if not tasks:
        return NoTasks(reason="empty", detail=f"a list of {len(values)} without a task")
    return Brainstormed(tasks=tasks, blank=len(values) - len(tasks), repairs=repairs)


def same(task: str) -> str:
    """What two tasks share that are one: case, white space and a dot at the end are not looked at."""
    return " ".join(task.split()).rstrip(" .。।").casefold()


class Pool:
    """Tasks by family in the order they came, each once."""

    def __init__(self, tasks: Iterable[Task] = ()) -> None:
        self._tasks: dict[str, list[Task]] = {family: [] for family in ASYMMETRIC}
        self._seen: set[tuple[str, str]] = set()
        for task in tasks:
            self.add(task)

    def add(self, task: Task) -> bool:
        """Whether it was new. Raises ConfigError for a family that has no tasks."""
        if problem := family_problem(task.family):
            raise ConfigError(f"tasks: {problem}")
        key = (task.family, same(task.task))
        if key in self._seen:
            return False
        self._seen.add(key)
        self._tasks[task.family].append(task)
        return True

    def of(self, family: str) -> tuple[str, ...]:
        return tuple(task.task for task in self._tasks[family])

    def __iter__(self) -> Iterator[Task]:
        return (task for tasks in self._tasks.values() for task in tasks)

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def digest(self) -> str:
        """sha256 of the tasks in their order, by family; where they are from is left out."""
        return hashlib.sha256(json.dumps({family: self.of(family) for family in self._tasks}).encode()).hexdigest()

    def to_lines(self) -> bytes:
        """JSON lines of family, task and source."""
        return "".join(json.dumps(vars(task), ensure_ascii=False) + "\n" for task in self).encode()


def read_file(url: str, access: Access, *, setting: str = "tasks") -> Iterator[Task]:
    """The tasks of a JSON lines, CSV, TSV or Parquet file with columns family and task, and source if it has one; else the file is the source.

    Raises ConfigError where a column is missing, InputError for a file that cannot be read and for a row that is no task, with its number from 1.
    """
    shown = redact(url)

    def choose(names: Any) -> list[str]:
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise ConfigError(f"{setting}: {shown} has no column {' and '.join(missing)}; its columns are {', '.join(names)}")
        return [name for name in (*COLUMNS, "source") if name in names]

    for number, row in enumerate(corpus_rows.read(url, access, choose, setting=setting), 1):
        family, task, source = row.get("family"), row.get("task"), row.get("source")
        where = f"{setting}: {shown} row {number}"
        if problem := family_problem(family):
            raise InputError(f"{where}: {problem}")
        if problem := corpus_rows.text_problem(task):
            raise InputError(f"{where}: {repr(task)[:60]} is no task ({problem}); write one sentence that says what the query is and what fits it")
        yield Task(family=str(family), task=" ".join(str(task).split()), source=source if isinstance(source, str) and source else shown)


def family_problem(family: Any) -> str | None:
    """Why there are no tasks of it, None where there are."""
    if family in ASYMMETRIC:
        return None
    known = f"families with tasks are {', '.join(ASYMMETRIC)}"
    return f"family {family} has one fixed instruction and no tasks; {known}" if family in FAMILIES else f"family {family!r} is not known; {known}"
