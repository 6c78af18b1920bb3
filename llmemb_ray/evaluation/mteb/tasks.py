"""Chosen tasks of mteb, run and kept: mteb's own result files under OUT/mteb, a score a task.

Invariant: a task whose result stands under the same model, space and settings is not run again. Names are checked
before a model is loaded; a data set that is not on the machine is named with the way to get it, without a network before
the first task runs.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmemb_ray.config import EvaluateSettings, parse_actors
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.evaluation.mteb.encoder import library
from llmemb_ray.evaluation.mteb.search import Searcher, Standby
from llmemb_ray.evaluation.suite import Score, choose
from llmemb_ray.storage import Storage, absolute

MOCK = "mock"
"""Stands for all of mteb's mock tasks for text: made-up data of a few sentences, a check of the machinery."""

PAPER = "MTEB(eng, v1)"
"""The 56 tasks of paper 2."""

BATCH = 4096
"""Texts that mteb hands over at a time; the pool cuts them as it needs."""

DIRECTORY = "mteb"


def check(names: Sequence[str]) -> list[str]:
    """The names of tasks and benchmarks in mteb's spelling. Raises ConfigError with the nearest names, or if mteb is missing or nothing is named.

    names: as ``--suite mteb:A,B`` gives them, cut at commas, also those within a benchmark's name.
    """
    mteb = library()
    whole = _rejoined(names)
    if not whole:
        raise ConfigError(f"suite: mteb needs names: mteb:SciFact,STS12 for tasks, 'mteb:{PAPER}' for a benchmark (the 56 of paper 2), mteb:{MOCK} for a check")
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    aliases = {alias.casefold(): name for name, benchmark in benchmarks.items() for alias in benchmark.aliases or ()}
    known = [MOCK, PAPER, *(name for name in benchmarks if name != PAPER), *_text_tasks(mteb), *_mocks(mteb)]
    return list(dict.fromkeys(choose([aliases.get(name.casefold(), name)], known, "mteb")[0] for name in whole))


def run_suite(
    settings: EvaluateSettings, spec: EmbedderSpec, names: Sequence[str], out: str, *, say: Callable[[str], None] = lambda line: None
) -> dict[str, Score]:
    """Runs tasks and returns their main scores × 100, in the order of ``names``.

    spec: of the embedder, settled; its actors are started here, and are down while a big corpus is embedded by a job.
    names: as ``check`` returned them; out: directory or URL prefix of the evaluation. Result files: out/mteb/results/MODEL/REVISION/TASK.json.
    Raises InputError for data that are not on this machine, ConfigError, ModelError, and what the embedding job raises.
    """
    from llmemb_ray.connection import connected

    tasks = [task for name in names for task in _tasks_of(name)]
    on_cluster = parse_actors(settings.actors) != (0, 0)
    with connected(settings.ray_address) if on_cluster else nullcontext(), Standby.of(settings, spec) as standby:
        instructed = settings.task_instructions and settings.prompt == "e5" and settings.representation is None and settings.instruction is None
        model = Searcher(
            standby,
            settings,
            f"{out}/{DIRECTORY}",
            job_documents=settings.mteb_job_documents,
            put_down=standby.put_down,
            task_instructions=instructed,
            plain_documents=settings.instruction is not None,
            role=settings.role,
        )
        return run_tasks(model, tasks, Storage(absolute(f"{out}/{DIRECTORY}"), settings.access), say=say)


def run_tasks(model: Any, tasks: Iterable[Any], kept: Storage, *, say: Callable[[str], None] = lambda line: None) -> dict[str, Score]:
    """A score for each of mteb's tasks, run on an ``Encoder``; result files are kept under ``results`` in ``kept``. Raises InputError."""
    mteb = library()
    scores: dict[str, Score] = {}
    with tempfile.TemporaryDirectory(prefix="llmemb-mteb-") as directory, _quiet():
        cache = mteb.ResultCache(cache_path=directory)
        there = _fetch(kept, Path(directory))
        tasks = list(tasks)
        for task in tasks:
            _look_for_data(task, model, cache)
        for task in tasks:
            before = model.blank, model.rejected
            try:
                result = _run(mteb, model, task, cache)
            finally:
                _keep(kept, Path(directory), there)
            scores[task.metadata.name] = score = _score(task, result, blank=model.blank - before[0], rejected=model.rejected - before[1])
            say(f"mteb {task.metadata.name}: {score.main:.2f}")
    return scores


def by_type(scores: dict[str, Score]) -> dict[str, float]:
    """Mean of the tasks of each type, as paper 2's tables have it."""
    types = sorted({score.parts["type"] for score in scores.values()})
    return {name: float(np.mean([score.main for score in scores.values() if score.parts["type"] == name])) for name in types}


def _run(mteb: Any, model: Any, task: Any, cache: Any) -> Any:
    """mteb's result of one task. The parts of a task that is made of others are run, and kept, one by one."""
    parts = _parts(task)
    for part in parts:
        _run(mteb, model, part, cache)
    if not parts and not _is_done(task, model, cache):
        with _told(task):
            task.load_data()
    try:
        results = mteb.evaluate(
            model, task, cache=cache, co2_tracker=False, show_progress_bar=False, encode_kwargs={"batch_size": BATCH, "show_progress_bar": False}
        )
    finally:
        if task.data_loaded:
            task.unload_data()
    return results.task_results[0]


def _parts(task: Any) -> list[Any]:
    """The tasks that a task is made of; none for most."""
    return list(getattr(task.metadata, "tasks", None) or [])


def _is_done(task: Any, model: Any, cache: Any) -> bool:
    earlier = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
    return earlier is not None and not earlier.get_missing_evaluations(task)


def _look_for_data(task: Any, model: Any, cache: Any) -> None:
    """Without a network, looks whether the data of a task that will run are here, as mteb's own ways of loading begin. Raises InputError."""
    import datasets

    for part in _parts(task):
        _look_for_data(part, model, cache)
    usual = type(task).load_data.__module__.startswith("mteb.abstasks.")
    if usual and datasets.config.HF_HUB_OFFLINE and not _parts(task) and not _is_done(task, model, cache):
        with _told(task):
            datasets.get_dataset_config_names(task.metadata.dataset["path"], revision=task.metadata.dataset.get("revision"))


@contextmanager
def _told(task: Any) -> Iterator[None]:
    """Data that cannot be had are told with the way to get them. Raises InputError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        name, dataset = task.metadata.name, task.metadata.dataset
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"mteb task {name}: its data set {dataset['path']} at {str(dataset.get('revision'))[:12]} is not to be had on this machine: {reason}. "
            f"Where there is a network, run python -c \"import mteb; mteb.get_task('{name}').load_data()\" without HF_HUB_OFFLINE "
            f"(here {os.environ.get('HF_HUB_OFFLINE', 'not set')}), and bring the cache here: HF_HOME names its directory"
        ) from error


def _score(task: Any, result: Any, *, blank: int, rejected: int) -> Score:
    subsets = {f"{split}/{entry['hf_subset']}": 100 * float(entry["main_score"]) for split, entries in result.scores.items() for entry in entries}
    parts: dict[str, Any] = {"type": task.metadata.type, "metric": task.metadata.main_score}
    if len(subsets) > 1:
        parts["subsets"] = subsets
    if blank:
        parts["blank_texts"] = blank
    if rejected:
        parts["rejected_documents"] = rejected
    return Score(main=100 * float(result.get_score()), parts=parts)


def _rejoined(names: Sequence[str]) -> list[str]:
    """Names whose parentheses were cut at a comma, whole again."""
    whole: list[str] = []
    for name in names:
        if whole and whole[-1].count("(") > whole[-1].count(")"):
            whole[-1] += f", {name.strip()}"
        else:
            whole.append(name.strip())
    return whole


@cache
def _text_tasks(mteb: Any) -> list[str]:
    options = {"exclude_superseded": False, "exclude_private": False, "exclude_beta": False}
    return [task.metadata.name for task in mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True, **options)]


@cache
def _mocks(mteb: Any) -> dict[str, Any]:
    """Mock tasks for text by name: their classes."""
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    return {task.metadata.name: type(task) for task in ALL_MOCK_TASK_TEST_GRID if task.metadata.modalities == ["text"]}


def _tasks_of(name: str) -> list[Any]:
    mteb = library()
    mocks = _mocks(mteb)
    if name == MOCK:
        return [mock() for mock in mocks.values()]
    if name in mocks:
        return [mocks[name]()]
    if name in {benchmark.name for benchmark in mteb.get_benchmarks()}:
        return list(mteb.get_benchmark(name).tasks)
    return [mteb.get_task(name)]


def _fetch(kept: Storage, directory: Path) -> dict[str, bytes]:
    """Brings earlier result files to where mteb looks for them."""
    there = {entry.path: kept.read(entry.path) for entry in kept.list("results")}
    for path, data in there.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    return there


def _keep(kept: Storage, directory: Path, there: dict[str, bytes]) -> None:
    """Writes the files that are new or changed."""
    for file in sorted(directory.glob("results/**/*")):
        path = file.relative_to(directory).as_posix()
        if file.is_file() and there.get(path) != (data := file.read_bytes()):
            kept.put(path, data)
            there[path] = data


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars of the library that holds the data sets, and without warnings of mteb and of what it computes scores with."""
    from datasets.utils import logging

    was = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for package in ("mteb", "sklearn"):
                warnings.filterwarnings("ignore", module=package)
            yield
    finally:
        if was:
            logging.enable_progress_bar()
