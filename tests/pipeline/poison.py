"""Rows that kill the process which embeds them, or break vLLM's engine. Installed in the workers of a test's own Ray; the engine stays the real one."""

from __future__ import annotations

import os
from typing import Any

REPEATS = 64
"""A prompt that holds one token so often kills its process."""

BREAKS = "LLMEMB_TEST_POISON_BREAKS_ENGINE"
"""Set in the environment: such a row does not end its process, but breaks the engine of vLLM in it."""

POISON = "~" * (4 * REPEATS)


def install() -> None:
    """Wraps the backends of this worker process."""
    from llmemb_ray.embedders.transformers_backend import TransformersBackend
    from llmemb_ray.embedders.vllm_backend import VllmBackend

    for class_ in (TransformersBackend, VllmBackend):
        class_.embed = poisoned(class_.embed)  # type: ignore[attr-defined]


def poisoned(plain: Any) -> Any:
    """The method ``embed`` of a backend, for which such a row is poison."""
    import numpy as np

    def embed(self: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        for row in range(len(rows)):
            if len(rows[row]) and np.bincount(rows[row]).max() >= REPEATS:
                if BREAKS in os.environ:
                    break_engine(self)
                else:
                    os._exit(13)
        return plain(self, rows, *args, **kwargs)

    return embed


def break_engine(backend: Any) -> None:
    """Lets the next step of vLLM's engine fail, as an illegal memory access on a GPU would."""

    def step() -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    backend._engine.raw.step = step
