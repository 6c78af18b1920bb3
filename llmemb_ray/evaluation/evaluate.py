"""The evaluation from settings to record: read data, embed what the tasks need, score, keep.

Invariant: what cannot work (no data, a malformed line, no such task, no room for a passkey) is told before a model is loaded.
Figures of one directory are of one space: suites that are evaluated later join the record, another representation is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import platform
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmemb_ray.config import EvaluateSettings, parse_actors
from llmemb_ray.config.evaluation import SUITES
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, InputError, RunMismatch
from llmemb_ray.evaluation import hub, record
from llmemb_ray.evaluation.contamination import Contamination, check
from llmemb_ray.evaluation.data import DataPlace
from llmemb_ray.evaluation.mteb import tasks as mteb_tasks
from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.evaluation.suite import Building, Score, Suite, Task, Texts, choose
from llmemb_ray.evaluation.vectors import Vectors
from llmemb_ray.pipeline import planning
from llmemb_ray.representation.space import differences
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage, absolute
from llmemb_ray.written import command_line

MTEB = "mteb"
"""Runs by its own library, which asks for vectors as it goes."""

AVERAGE = "avg"

PROTOCOL = ("seed", "classifier", "folds", "top_k", "split", "task_instructions")
"""Settings under which tasks of a suite that were evaluated one after the other make one average."""

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
    chosen = {choose([name], SUITES, "llmemb evaluate")[0]: tasks for name, tasks in settings.suites().items()}
    mteb_names = mteb_tasks.check(chosen[MTEB]) if MTEB in chosen else []
    spec = settle(settings)
    out = output_of(settings, spec)
    storage = Storage(absolute(out), settings.access)
    earlier = _earlier(storage, settings, spec)
    data = _data(settings, chosen)
    on_cluster = parse_actors(settings.actors) != (0, 0)
    suites: dict[str, tuple[Suite, list[Task]]] = {}
    for name, wanted in chosen.items():
        if name != MTEB:
            suite = suite_of(name)
            building = Building(settings=settings, data=data, spec=spec, wanted=wanted, scratch=f"{out}/data", on_cluster=on_cluster)
            suites[name] = suite, suite.build(building)
    needs = {name: [task.needs() for task in tasks] for name, (_, tasks) in suites.items()}
    contamination = _contamination(settings, suites, needs)
    started = time.monotonic()
    results: dict[str, dict[str, Score]] = {}
    seconds: dict[str, float] = {}
    vectors = Vectors(settings, spec, out)
    with _cluster(settings) if on_cluster else contextlib.nullcontext():
        texts = sum(len(need.texts) for lists in needs.values() for wants in lists for need in wants if isinstance(need, Texts))
        if texts:
            say(f"{', '.join(suites)}: {sum(len(tasks) for _, tasks in suites.values())} tasks want vectors of {texts:,} texts; each is embedded once")
        with vectors.embedded(need for lists in needs.values() for wants in lists for need in wants):
            seconds["embed"] = time.monotonic() - started
            for name, (_, tasks) in suites.items():
                begun = time.monotonic()
                results[name] = {}
                for task, wants in zip(tasks, needs[name], strict=True):
                    results[name][task.name] = task.score([vectors.of(need) for need in wants])
                    say(f"{name} {task.name}: {results[name][task.name].main:.2f}")
                seconds[name] = time.monotonic() - begun
        if MTEB in chosen:
            begun = time.monotonic()
            results[MTEB] = mteb_tasks.run_suite(settings, spec, mteb_names, out, say=say)
            for kind, mean in mteb_tasks.by_type(results[MTEB]).items():
                say(f"mteb, mean of {kind}: {mean:.2f}")
            seconds[MTEB] = time.monotonic() - begun
    made = _record(settings, spec, results, {name: suite.apart for name, (suite, _) in suites.items()}, vectors, seconds, contamination, earlier, out)
    made.save(storage)
    return made


def output_of(settings: EvaluateSettings, spec: EmbedderSpec) -> str:
    """Directory or URL prefix of the evaluation."""
    return (settings.out or f"evaluation/{posixpath.basename(settings.model.rstrip('/'))}-{spec.space.digest[:8]}").rstrip("/")


def _data(settings: EvaluateSettings, chosen: Mapping[str, list[str]]) -> DataPlace:
    wanted = {name: tasks for name, tasks in chosen.items() if name not in WITHOUT_DATA}
    if not wanted:
        return DataPlace(Path())
    return hub.place(wanted, settings.split) if settings.data == hub.HUB else DataPlace.of(settings.data)


def suite_of(name: str) -> Suite:
    module, _, attribute = PLACES[name].partition(":")
    suite: Suite = getattr(importlib.import_module(f"llmemb_ray.evaluation.{module}"), attribute)
    return suite


def contaminated(settings: EvaluateSettings) -> Contamination:
    """The contamination check alone, without a model. Raises ConfigError for a suite whose texts depend on a model."""
    chosen = {choose([name], SUITES, "llmemb evaluate")[0]: tasks for name, tasks in settings.suites().items()}
    data = _data(settings, chosen)
    suites = {}
    for name, wanted in chosen.items():
        if name in WITHOUT_DATA:
            raise ConfigError(f"contamination: {name} has no texts of its own to look for; name other suites")
        building = Building(settings=settings, data=data, spec=None, wanted=wanted, scratch=settings.out or "evaluation/data", on_cluster=False)
        suites[name] = suite_of(name), suite_of(name).build(building)
    made = _contamination(settings, suites, {name: [task.needs() for task in tasks] for name, (_, tasks) in suites.items()})
    assert made is not None
    return made


def _contamination(settings: EvaluateSettings, suites: Mapping[str, tuple[Suite, list[Task]]], needs: Mapping[str, list[list[Any]]]) -> Contamination | None:
    if not settings.contamination:
        return None
    texts = {
        f"{name} {task.name}": [text for need in wants if isinstance(need, Texts) for text in need.texts]
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


def _earlier(storage: Storage, settings: EvaluateSettings, spec: EmbedderSpec) -> Evaluation | None:
    """The record that stands in OUT. Raises RunMismatch if it is of another space."""
    if not storage.exists(record.PATH):
        return None
    earlier = record.load(storage.url, storage.access)
    if earlier.space != spec.space.digest:
        ours = {"commit": spec.model.commit, "adapter": settings.adapter, "representation": spec.representation.to_dict(), "context": _context(spec)}
        theirs = {"commit": earlier.commit, "adapter": earlier.adapter, "representation": earlier.representation, "context": earlier.context}
        lines = "\n".join(f"  {name}: there {there!r}, asked for now {here!r}" for name, here, there in differences(ours, theirs))
        raise RunMismatch(f"out: {storage.url} holds an evaluation in another vector space; name another --out\n{lines}")
    return earlier


def _context(spec: EmbedderSpec) -> dict[str, Any]:
    return {name: value for name, value in (spec.space.to_dict().get("context") or {}).items() if value is not None}


def _record(
    settings: EvaluateSettings,
    spec: EmbedderSpec,
    results: Mapping[str, Mapping[str, Score]],
    apart: Mapping[str, tuple[str, ...]],
    vectors: Vectors,
    seconds: dict[str, float],
    contamination: Contamination | None,
    earlier: Evaluation | None,
    out: str,
) -> Evaluation:
    suites = dict(earlier.suites) if earlier else {}
    details = dict(earlier.details) if earlier else {}
    for name, scores in results.items():
        if not scores:
            raise InputError(f"suite: {name} has no task to evaluate")
        joins = earlier is not None and all(earlier.protocol.get(key) == getattr(settings, key) for key in PROTOCOL)
        figures = {task: value for task, value in suites.get(name, {}).items() if joins and task != AVERAGE}
        figures |= {task: score.main for task, score in scores.items()}
        averaged = [value for task, value in figures.items() if task not in apart.get(name, ())]
        suites[name] = figures | ({AVERAGE: float(np.mean(averaged))} if averaged else {})
        details[name] = (details.get(name, {}) if joins else {}) | {task: score.parts for task, score in scores.items()}
    if vectors.runs:
        engine = Run(Storage(absolute(vectors.runs[0]), settings.access)).plan.engine
    else:
        here = spec.on(models.default_device() == "cuda")
        engine = {"backend": here.backend, "compute_dtype": here.compute_dtype, "quantization": here.quantization}
    counts = {"texts": vectors.counts.wanted, "texts_embedded": vectors.counts.distinct, "tokens": vectors.counts.tokens}
    return Evaluation(
        model=settings.model,
        commit=spec.model.commit,
        adapter=settings.adapter,
        parameters=spec.parameters,
        method=record.method(spec.representation),
        representation=spec.representation.to_dict(),
        space=spec.space.digest,
        context=_context(spec),
        dimension=spec.dimension,
        engine={name: engine[name] for name in ("backend", "compute_dtype", "quantization")},
        suites=suites,
        details=details,
        counts=counts,
        seconds=(earlier.seconds if earlier else {}) | {name: round(value, 2) for name, value in seconds.items()},
        contamination=contamination.to_dict() if contamination else earlier.contamination if earlier else {},
        protocol={name: getattr(settings, name) for name in PROTOCOL},
        settings={name: value for name, value in settings.model_dump(mode="json", exclude={"storage_options"}).items() if name in settings.model_fields_set},
        versions=planning.versions(),
        out=out,
        machine=f"{platform.processor() or platform.machine()}, {platform.system()}",
        command=command_line(settings, "evaluate"),
        finished=time.time(),
    )
