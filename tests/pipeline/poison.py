"""A row that kills the process which embeds it. Installed in the workers of a test's own Ray; the engine stays the real one."""

from __future__ import annotations

import os
from typing import Any

REPEATS = 64
"""A prompt that holds one token so often kills its process."""

POISON = "~" * (4 * REPEATS)


def install() -> None:
    """Wraps the backend of this worker process."""
    import numpy as np

    from llmemb_ray.embedders.transformers_backend import TransformersBackend

    plain = TransformersBackend.embed

    def embed(self: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        for row in range(len(rows)):
            if len(rows[row]) and np.bincount(rows[row]).max() >= REPEATS:
                os._exit(13)
        return plain(self, rows, *args, **kwargs)

    TransformersBackend.embed = embed  # type: ignore[method-assign]
