"""Embedding as a stage of one's own Ray Data pipeline, without units, shards or commits."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
import pyarrow as pa

from llmemb_ray.config import ModelSettings
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec, settle
from llmemb_ray.errors import ConfigError
from llmemb_ray.shards.schema import embedding_column


class EmbedStage:
    """Adds an ``embedding`` column to batches of text.

    >>> stage = EmbedStage("facebook/opt-125m", text_column="text")                       # doctest: +SKIP
    >>> ds.map_batches(stage, batch_format="pyarrow", batch_size=1024)                    # doctest: +SKIP

    Used so, as tasks, the model is loaded once a worker process. On GPUs, where Ray ends a task's process with
    the task, pass ``stage.actor`` instead: ``ds.map_batches(stage.actor, num_gpus=1, compute=ActorPoolStrategy(size=8), …)``.

    A row whose text is null, empty or cannot be embedded gets a null vector: nothing is left out or reordered.
    model, settings: as for ``Embedder.load``. Raises ConfigError or ModelError when it is made, not on the cluster.
    """

    def __init__(self, model: str, *, text_column: str = "text", output_column: str = "embedding", **settings: Any) -> None:
        self._settings = ModelSettings.make({"model": model, **settings})
        self._spec: EmbedderSpec = settle(self._settings)
        self._key = uuid.uuid4().hex
        self._text_column, self._output_column = text_column, output_column

    @property
    def actor(self) -> type:
        """A callable class for actor pools; each actor holds the model."""
        stage = self

        class EmbedActor:
            def __init__(self) -> None:
                stage._embedder()

            def __call__(self, batch: pa.Table) -> pa.Table:
                return stage(batch)

        return EmbedActor

    def _embedder(self) -> Embedder:
        if self._key not in _LOADED:
            _LOADED.clear()
            _LOADED[self._key] = Embedder(self._spec)
        return _LOADED[self._key]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """batch: a pyarrow Table (``batch_format="pyarrow"``). Returns it with the column added."""
        if not isinstance(batch, pa.Table):
            raise ConfigError("EmbedStage takes Arrow batches; pass batch_format='pyarrow' to map_batches")
        texts, problems = Selection(text=self._text_column).texts(batch)
        embedded = self._embedder().encode_rows([text or "" for text in texts], self._settings.role)
        missing = np.zeros(len(texts), np.bool_)
        missing[[*problems, *embedded.failed]] = True
        column = embedding_column(embedded.vectors, "float32")
        if missing.any():
            column = pa.FixedSizeListArray.from_arrays(column.values, column.type.list_size, mask=pa.array(missing))
        return batch.append_column(self._output_column, column)


_LOADED: dict[str, Embedder] = {}
"""The embedder of the stage that this process last served, by the stage's key: survives the stage's own unpickling."""
