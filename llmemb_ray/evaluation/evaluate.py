"""The evaluation from settings to record: read data, embed what the tasks need, score, keep.

Invariant: what cannot work (no data, a malformed line, no such task, no room for a passkey) is told before a model is loaded.
Figures of one directory are of one space: suites that are evaluated later join the record, another representation is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmemb_ray.config import EvaluateSettings, parse_actors
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, InputError, RunMismatch
from llmemb_ray.evaluation import hub, record
from llmemb_ray.evaluation.contamination import Contamination, check
from llmemb_ray.evaluation.data import VARIABLE, DataPlace
from llmemb_ray.evaluation.mteb import tasks as mteb_tasks
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.evaluation.suite import Building, Score, Suite, Task, Texts
from llmemb_ray.evaluation.vectors import ENGINE, Vectors
from llmemb_ray.pipeline import planning
from llmemb_ray.representation.space import differences
from llmemb_ray.storage import Storage, absolute
from llmemb_ray.written import command_line, given_settings

MTEB = "mteb"
"""Runs by its own library, which asks for vectors as it goes."""

AVERAGE = "avg"

CONTAMINATION = "contamination.json"
"""Of the check alone; with a model it stands in the record."""

WITHOUT_DATA = (MTEB, "passkey")

PLACES = {
    "sts": "sts:SUITE",
    "sts-raw": "sts:RAW_SUITE",
    "transfer": "transfer:SUITE",
    "retrieval": "retrieval:SUITE",
    "bitext": "bitext:SUITE",
    "passkey": "passkey:SUITE",
}
"""Module and name of each suite; imported when it is asked for."""

Say = Callable[[str], None]


def run(settings: EvaluateSettings, *, say: Say = lambda line: None) -> Evaluation:
    """Evaluates one model and keeps the record in ``settings.out``.

    Raises ConfigError, InputError, ModelError, OutputError or what the embedding job raises.
    """
    chosen = settings.suites()
    _require_texts(settings, chosen)
    mteb_names = mteb_tasks.check(chosen[MTEB]) if MTEB in chosen else []
    spec = settle(settings)
    keeper = _Keeper(settings, spec, say)
    data = _data(settings, chosen)
    on_cluster = parse_actors(settings.actors) != (0, 0)
    suites = _suites(settings, chosen, data, spec, keeper.out, on_cluster=on_cluster)
    needs = {name: [task.needs() for task in tasks] for name, (_, tasks) in suites.items()}
    contamination = _contamination(settings, suites, needs)
    vectors = Vectors(settings, spec, keeper.out)
    with _cluster(settings) if on_cluster else contextlib.nullcontext():
        texts = sum(len(need.texts) for lists in needs.values() for wants in lists for need in wants if isinstance(need, Texts))
        if texts:
            say(f"{', '.join(suites)}: {sum(len(tasks) for _, tasks in suites.values())} tasks want vectors of {texts:,} texts; each is embedded once")
        with vectors.embedded(need for lists in needs.values() for wants in lists for need in wants):
            for name, (suite, tasks) in suites.items():
                begun = time.monotonic() - vectors.counts.seconds
                scores = {}
                for task, wants in zip(tasks, needs[name], strict=True):
                    scores[task.name] = task.score([vectors.of(need) for need in wants])
                    say(f"{name} {task.name}: {scores[task.name].main:.2f}")
                keeper.keep(name, scores, vectors, seconds=time.monotonic() - vectors.counts.seconds - begun, apart=suite.apart, contamination=contamination)
        if MTEB in chosen:
            begun = time.monotonic()
            scores = mteb_tasks.run_suite(settings, spec, mteb_names, keeper.out, say=say)
            for kind, mean in mteb_tasks.by_type(scores).items():
                say(f"mteb, mean of {kind}: {mean:.2f}")
            keeper.keep(MTEB, scores, vectors, seconds=time.monotonic() - begun)
    assert keeper.made is not None
    return keeper.made


class _Keeper:
    """Joins each suite to the record in OUT as soon as it is scored, so that what follows can fail without loss."""

    def __init__(self, settings: EvaluateSettings, spec: EmbedderSpec, say: Say) -> None:
        """Raises RunMismatch if OUT holds a record of another space."""
        self._settings, self._spec, self._say = settings, spec, say
        self.out = output_of(settings, spec)
        self._storage = Storage(absolute(self.out), settings.access)
        self.made: Evaluation | None = None
        self._earlier()

    def keep(
        self,
        suite: str,
        scores: Mapping[str, Score],
        vectors: Vectors,
        *,
        seconds: float,
        apart: Sequence[str] = (),
        contamination: Contamination | None = None,
    ) -> None:
        """seconds: of scoring, without embedding. The record is read again: another command may have joined its own suites meanwhile."""
        if not scores:
            raise InputError(f"suite: {suite} has no task to evaluate")
        earlier = self._earlier() or self._blank()
        protocol = self._protocol(suite, vectors)
        before = earlier.protocol.get(suite, protocol)
        changed = [f"{name} {before.get(name)} → {value}" for name, value in protocol.items() if name != "backend" and before.get(name) != value]
        joins = not changed
        if changed and set(earlier.suites.get(suite, {})) - set(scores) - {AVERAGE}:
            self._say(f"note: {suite}'s earlier figures in {self.out} were made otherwise ({', '.join(changed)}) and are replaced")
        figures = {task: value for task, value in earlier.suites.get(suite, {}).items() if joins and task != AVERAGE}
        figures |= {task: score.main for task, score in scores.items()}
        averaged = [value for task, value in figures.items() if task not in apart]
        self.made = replace(
            earlier,
            engine={name: protocol[name] for name in ENGINE},
            suites=earlier.suites | {suite: figures | ({AVERAGE: float(np.mean(averaged))} if averaged else {})},
            details=earlier.details | {suite: (earlier.details.get(suite, {}) if joins else {}) | {task: score.parts for task, score in scores.items()}},
            protocol=earlier.protocol | {suite: protocol},
            counts={"texts": vectors.counts.wanted, "texts_embedded": vectors.counts.distinct, "tokens": vectors.counts.tokens},
            seconds=earlier.seconds | {"embed": round(vectors.counts.seconds, 2), suite: round(seconds, 2)},
            contamination=contamination.to_dict() if contamination else earlier.contamination,
            settings=given_settings(self._settings),
            versions=planning.versions(),
            out=self.out,
            machine=f"{platform.processor() or platform.machine()}, {platform.system()}",
            command=command_line(self._settings, "evaluate"),
            finished=time.time(),
        )
        self.made.save(self._storage)

    def _earlier(self) -> Evaluation | None:
        """The record that stands in OUT. Raises RunMismatch if it is of another space."""
        if not self._storage.exists(record.PATH):
            return None
        earlier, blank = record.load(self._storage.url, self._settings.access), self._blank()
        if earlier.space != blank.space:
            names = ("commit", "adapter", "representation", "context")
            ours, theirs = ({name: getattr(one, name) for name in names} for one in (blank, earlier))
            lines = "\n".join(f"  {name}: there {there!r}, asked for now {here!r}" for name, here, there in differences(ours, theirs))
            raise RunMismatch(f"out: {self._storage.url} holds an evaluation in another vector space; name another --out\n{lines}")
        return earlier

    def _blank(self) -> Evaluation:
        spec = self._spec
        return Evaluation(
            model=self._settings.model,
            commit=spec.model.commit,
            adapter=self._settings.adapter,
            parameters=spec.parameters,
            method=record.method(spec.representation, self._settings.prompt if self._settings.representation is None else None),
            representation=spec.representation.to_dict(),
            space=spec.space.digest,
            context={name: value for name, value in (spec.space.to_dict().get("context") or {}).items() if value is not None},
            dimension=spec.dimension,
            engine={},
            suites={},
        )

    def _protocol(self, suite: str, vectors: Vectors) -> dict[str, Any]:
        settings = self._settings
        instructed = settings.prompt == "e5" and settings.representation is None and settings.instruction is None
        own = {name: getattr(settings, name) for name in record.PROTOCOL.get(suite, ()) if name != "task_instructions" or instructed}
        here = self._spec.on(models.default_device() == "cuda")
        return own | (vectors.engine or {name: getattr(here, name) for name in ENGINE})


def output_of(settings: EvaluateSettings, spec: EmbedderSpec) -> str:
    """Directory or URL prefix of the evaluation."""
    return (settings.out or f"evaluation/{posixpath.basename(settings.model.rstrip('/'))}-{spec.space.digest[:8]}").rstrip("/")


def _data(settings: EvaluateSettings, chosen: Mapping[str, list[str]]) -> DataPlace:
    wanted = {name: [task for task in tasks if "/" not in task] for name, tasks in chosen.items() if name not in WITHOUT_DATA}
    wanted = {name: tasks for name, tasks in wanted.items() if tasks or not chosen[name]}  # Collections that are named by their directories need none.
    if not wanted:
        return DataPlace(Path())
    named = settings.data or os.environ.get(VARIABLE)
    return hub.place(wanted, settings.split) if named == hub.HUB else DataPlace.of(named)


def _suites(
    settings: EvaluateSettings, chosen: Mapping[str, list[str]], data: DataPlace, spec: EmbedderSpec | None, out: str, *, on_cluster: bool
) -> dict[str, tuple[Suite, list[Task]]]:
    """Each suite with its tasks, their data read; without mteb."""
    suites = {}
    for name, wanted in chosen.items():
        if name != MTEB:
            building = Building(settings=settings, data=data, spec=spec, wanted=wanted, scratch=f"{out}/data", on_cluster=on_cluster)
            suites[name] = suite_of(name), suite_of(name).build(building)
    return suites


def suite_of(name: str) -> Suite:
    module, _, attribute = PLACES[name].partition(":")
    suite: Suite = getattr(importlib.import_module(f"llmemb_ray.evaluation.{module}"), attribute)
    return suite


def contaminated(settings: EvaluateSettings) -> Contamination:
    """The contamination check alone, without a model. Raises ConfigError for a suite whose texts depend on a model."""
    chosen = settings.suites()
    _require_texts(settings, chosen)
    suites = _suites(settings, chosen, _data(settings, chosen), None, settings.out or "evaluation", on_cluster=False)
    made = _contamination(settings, suites, {name: [task.needs() for task in tasks] for name, (_, tasks) in suites.items()})
    assert made is not None
    if settings.out:
        Storage(absolute(settings.out), settings.access).put(CONTAMINATION, json.dumps(made.to_dict(), indent=1, ensure_ascii=False).encode())
    return made


def _require_texts(settings: EvaluateSettings, chosen: Mapping[str, list[str]]) -> None:
    """Raises ConfigError for a suite that contamination is asked of and that has no texts to look for."""
    without = sorted(set(chosen) & set(WITHOUT_DATA)) if settings.contamination else []
    if without:
        raise ConfigError(f"contamination: the texts of {', '.join(without)} are not known here; check other suites, in a command of their own")


def _contamination(settings: EvaluateSettings, suites: Mapping[str, tuple[Suite, list[Task]]], needs: Mapping[str, list[list[Any]]]) -> Contamination | None:
    if not settings.contamination:
        return None
    texts = {
        f"{name} {task.name}{' (queries)' if name == 'retrieval' else ''}": [text for need in wants if isinstance(need, Texts) for text in need.texts]
        for name, (_, tasks) in suites.items()
        for task, wants in zip(tasks, needs[name], strict=True)
    }
    return check(settings.contamination, texts, settings.access)


@contextlib.contextmanager
def _cluster(settings: EvaluateSettings) -> Iterator[None]:
    """One Ray for all that the evaluation does."""
    from llmemb_ray.connection import connected

    with connected(settings.ray_address):
        yield
