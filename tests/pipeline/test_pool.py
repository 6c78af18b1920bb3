"""Embedders that stay loaded: the vectors are the embedder's, whatever dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmemb_ray.config import EvaluateSettings
from llmemb_ray.connection import connected
from llmemb_ray.embedders.embedder import Embedder
from llmemb_ray.errors import ConfigError, InputError, RunFailed
from llmemb_ray.pipeline.crew import Crew
from llmemb_ray.pipeline.pool import Pool, pool
from llmemb_ray.pipeline.shape import Shape
from llmemb_ray.representation import Representation
from llmemb_ray.representation.representation import preset
from tests.small_models import SENTENCES

pytestmark = pytest.mark.timeout(120)


def settings(model: Path, actors: str) -> EvaluateSettings:
    return EvaluateSettings.make({"model": str(model), "suite": ["sts"], "actors": actors, "cpus_per_actor": 0.5, "normalize": False})


def dying(path: Path, always: bool, held: Any, item: int) -> int:
    """Kills its own process at item 3, the first time or always."""
    if item == 3 and (always or not path.exists()):
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item + len(held)


def loaded_once(size: int, broken: bool = False) -> str:
    if broken:
        raise RuntimeError("no such device")
    return "x" * size


def shape() -> Shape:
    return Shape(least=1, most=1, gpus=0, cpus=0.5, threads=1)


# First, before the actors of the fixture below take the cores.
def test_work_whose_actor_dies_is_done_by_another_and_loading_that_fails_is_told(tmp_path: Path) -> None:
    with connected():
        crew: Crew[str] = Crew(partial(str, "x" * 1_000_000), shape(), attempts=3)  # Too large for Ray to keep with the actor itself.
        assert dict(crew.run(partial(dying, tmp_path / "no", False), range(2))) == {0: 1_000_000, 1: 1_000_001}
        time.sleep(3)  # In which Ray frees what nobody holds.
        answers = dict(crew.run(partial(dying, tmp_path / "died", False), range(8)))
        assert (tmp_path / "died").exists()
        assert answers == {number: number**2 + 1_000_000 for number in range(8)}
        with pytest.raises(RunFailed, match=r"an actor died 3 times with items (\d, )?3(, \d)? given to it: .*the same command continues"):
            dict(crew.run(partial(dying, tmp_path / "died", True), range(8)))
        crew.close()
        broken = Crew(partial(loaded_once, 1, broken=True), shape(), attempts=3)
        with pytest.raises(RunFailed, match="an actor failed while it loaded: RuntimeError: no such device"):
            dict(broken.run(partial(dying, tmp_path / "died", False), range(2)))
        broken.close()


@pytest.fixture(scope="module", params=["0", "2"])
def loaded(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[Pool, Embedder]]:
    """The same embedder as a pool, in this process and in two actors, and by itself."""
    chosen = settings(model, request.param)
    with pool(chosen) as embedders:
        yield embedders, Embedder.load(str(model), normalize=False)


def test_vectors_are_those_of_the_embedder_in_order(loaded: tuple[Pool, Embedder]) -> None:
    embedders, embedder = loaded
    texts = [*SENTENCES, "", *SENTENCES[:3]]
    assert np.abs(embedders.encode(texts) - embedder.encode(texts)).max() <= 1e-5


def test_another_representation_of_the_same_model(loaded: tuple[Pool, Embedder]) -> None:
    embedders, embedder = loaded
    document, query, eos = preset('Say "{text}":')
    other = Representation(document=document, query=query, append_eos=eos, normalize=True)
    vectors = embedders.encode(SENTENCES, representation=other)
    by_itself = Embedder.load(str(embedder.spec.model.name), prompt='Say "{text}":')
    assert np.abs(vectors - by_itself.encode(SENTENCES)).max() <= 1e-5
    with pytest.raises(ConfigError, match="pooling"):
        embedders.encode(SENTENCES, representation=Representation(pooling="mean"))
    with pytest.raises(ConfigError, match="loaded for prompts of"):
        embedders.encode(SENTENCES, representation=Representation(max_tokens=100_000))


def test_a_text_that_cannot_be_embedded_is_named(loaded: tuple[Pool, Embedder]) -> None:
    embedders, _ = loaded
    short = Representation(normalize=False, max_tokens=3)
    with pytest.raises(InputError, match=r"text 2 .*nothing but white space"):
        embedders.encode(["a", "b", "\t  " * 40 + "c"], representation=short)
