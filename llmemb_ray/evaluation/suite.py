"""What a suite of tasks is: which texts its tasks want vectors of, and how they score them.

Invariant: a task reads data and scores vectors; it never embeds. What it needs is embedded for all tasks together,
each text once, by the embedding job (``vectors``).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import ConfigError
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.representation.representation import Role
from llmemb_ray.shards.run import Run

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts that a task wants as a float32 matrix [N, D], a row a text, in their order. Equal ones may repeat."""

    texts: Sequence[str]
    role: Role = "document"
    instruction: str | None = None
    """Of paper 2 for this task: used where the prompt is e5 and the user gave no instruction."""
    plain: bool = False
    """Documents of an asymmetric task: an instruction of the user's is for the queries alone."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Parquet files that a task wants embedded as a run of their own, which it reads by itself: for what memory may not hold."""

    name: str
    """Of the run's directory, unique in a suite."""
    files: list[str]
    """Local paths or URLs, with the columns ``id`` and ``text_column``."""
    text_column: str = "text"
    """A column, or a template such as '{title} {text}'."""
    role: Role = "document"
    instruction: str | None = None
    plain: bool = True


Need: TypeAlias = Texts | Corpus
Embedded: TypeAlias = Floats | Run
"""What a need becomes: a matrix for Texts, a finished run for a Corpus."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """main: the task's figure × 100; parts: further figures (subsets, other metrics, chosen parameters), plain JSON values."""

    main: float
    parts: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """One task, its data read."""

    @property
    def name(self) -> str: ...

    def needs(self) -> list[Need]:
        """Asked for once."""

    def score(self, embedded: list[Any]) -> Score:
        """embedded: for each of ``needs``, in order, what it became (``Embedded``)."""


@dataclass(frozen=True, kw_only=True)
class Building:
    """What tasks are made from."""

    settings: EvaluateSettings
    data: DataPlace
    spec: EmbedderSpec | None
    """The embedder, as settled; None where no model is asked for, as by the contamination check alone."""
    wanted: Sequence[str]
    """Names of tasks; empty for all."""
    scratch: str
    """URL prefix in OUT for files that a suite makes of its data, such as Parquet of a corpus."""
    on_cluster: bool
    """Whether a Ray is connected, so that a task may spread its search over it."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named set of tasks."""

    name: str
    title: str
    build: Callable[[Building], list[Task]]
    """Reads the data of the wanted tasks. Raises ConfigError for a task that does not exist, InputError for data that are missing or malformed."""
    apart: tuple[str, ...] = ()
    """Tasks that are no part of the suite's average."""


def choose(wanted: Sequence[str], known: Iterable[str], suite: str) -> list[str]:
    """The tasks of a suite that are wanted, in the suite's order and spelling; all if none is named. Raises ConfigError with the nearest names."""
    names = list(known)
    by_fold = {name.casefold(): name for name in names}
    for name in wanted:
        if name.casefold() not in by_fold:
            near = difflib.get_close_matches(name.casefold(), by_fold, n=3, cutoff=0.4)
            nearest = f"; nearest: {', '.join(by_fold[fold] for fold in near)}" if near else ""
            shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
            raise ConfigError(f"suite: {suite} has no task {name!r}{nearest} (its tasks: {shown})")
    chosen = {by_fold[name.casefold()] for name in wanted} or set(names)
    return [name for name in names if name in chosen]
