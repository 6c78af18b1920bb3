"""Task instructions of paper 2, by the names that MTEB gives tasks: what prompt e5 tells a model about a task.

Invariant: the words are the paper's, in ``instructions.yaml``; nothing is made up for a task that it does not name.
This module knows neither models nor mteb.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

_VARIANT = re.compile(r"(-(fa|nl|pl|vn|reranking))?(hardnegatives|decontaminated)?(\.v\d+)?$")
"""What MTEB appends, in small letters, to the name of a task that it has translated, shrunk or revised."""


@dataclass(frozen=True, kw_only=True)
class TaskInstruction:
    text: str
    symmetric: bool
    """True: every text of the task gets it; False: queries alone."""


def instruction(task_name: str, task_type: str | None = None) -> str | None:
    """The instruction of a task, None where paper 2 has none. The same as ``find(…).text``."""
    found = find(task_name, task_type)
    return found.text if found else None


def find(task_name: str, task_type: str | None = None) -> TaskInstruction | None:
    """By the name of the task, else of the task it is a variant of (``FEVERHardNegatives``), else by its type. Upper and lower case are one.

    task_type: as MTEB names it (STS, Retrieval …); without it a task that is not in the table has no instruction.
    """
    types, tasks, patterns = _table()
    name = task_name.casefold()
    for candidate in dict.fromkeys((name, _VARIANT.sub("", name))):
        entry = tasks.get(candidate) or next((entry for pattern, entry in patterns.items() if fnmatch.fnmatchcase(candidate, pattern)), None)
        if entry is not None:
            listed, text = entry
            return TaskInstruction(text=text, symmetric=symmetric(task_type if task_type in types else listed))
    of_type = types.get(task_type or "", {}).get("instruction")
    return None if of_type is None else TaskInstruction(text=of_type, symmetric=symmetric(task_type))


def symmetric(task_type: str | None) -> bool:
    """Whether both sides of a task of this type get its instruction; of a type that paper 2 does not know, queries alone do."""
    return bool(_table()[0].get(task_type or "", {}).get("side") == "both")


@cache
def _table() -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, str]], dict[str, tuple[str, str]]]:
    """(type → side and instruction, task → its type and instruction, the same for names with a wildcard); names of tasks in small letters."""
    data: dict[str, Any] = yaml.safe_load(resources.files("llmemb_ray.evaluation").joinpath("instructions.yaml").read_text(encoding="utf-8"))
    entries = {name.casefold(): (task_type, text) for task_type, tasks in data["tasks"].items() for name, text in tasks.items()}
    patterns = {name: entry for name, entry in entries.items() if "*" in name}
    return data["types"], {name: entry for name, entry in entries.items() if name not in patterns}, patterns
