"""Rows that kill the process which embeds them, hang it, or break vLLM's engine. Installed in the workers of a test's own Ray; the engine stays real."""

from __future__ import annotations

import os
import threading
from typing import Any

REPEATS = 64
"""A prompt that holds one token so often kills its process."""

BREAKS = "LLMEMB_TEST_POISON_BREAKS_ENGINE"
"""Set in the environment: such a row does not end its process, but breaks the engine of vLLM in it."""

HANG_FILE = "LLMEMB_TEST_HANG_FILE"
"""Names a file in the environment: whoever computes next while it is there takes it away and hangs."""

POISON = "~" * (4 * REPEATS)

HANGS = "~^" * (2 * REPEATS)
"""Two tokens so often: hangs its process."""


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
        if HANG_FILE in os.environ and taken(os.environ[HANG_FILE]):
            hang()
        for row in range(len(rows)):
            often = np.count_nonzero(np.bincount(rows[row]) >= REPEATS) if len(rows[row]) else 0
            if often:
                if often > 1:
                    hang()
                elif BREAKS in os.environ:
                    break_engine(self)
                else:
                    os._exit(13)
        return plain(self, rows, *args, **kwargs)

    return embed


def taken(path: str) -> bool:
    """Whether this process is the one that removed a file."""
    try:
        os.remove(path)
    except FileNotFoundError:
        return False
    return True


def hang() -> None:
    """As a call that a GPU never answers: this thread waits for ever, the process lives."""
    threading.Event().wait()


def break_engine(backend: Any) -> None:
    """Lets the next step of vLLM's engine fail, as an illegal memory access on a GPU would."""

    def step() -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    backend._engine.raw.step = step
