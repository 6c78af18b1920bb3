"""mteb's SearchProtocol: a big corpus is embedded by the embedding job and searched over its shards.

Invariant: a corpus below the limit, and one of which only some documents are ranked, goes through mteb's own search
over the encoder; a bigger one is a run under OUT, which is continued where it was stopped and used again. Both rank by
cosine, of the same texts under the same representation. Actors are down while a job or a search takes their place.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.config import ClusterSettings, EmbedSettings, EvaluateSettings, parse_actors
from llmemb_ray.embedders import models
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import InputError
from llmemb_ray.evaluation.mteb.encoder import Embeds, Encoder
from llmemb_ray.evaluation.suite import Floats
from llmemb_ray.evaluation.vectors import ROW_GROUP
from llmemb_ray.representation import Representation, Role
from llmemb_ray.representation.space import digest
from llmemb_ray.search import exact
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage, absolute

FILE_ROWS = 250_000
"""Documents in one Parquet file of a corpus: some 100 MB of text."""

_SAID_BY_THE_REPRESENTATION = {"representation", "prompt", "demo", "instruction", "clean", "role", *Representation.__dataclass_fields__}


class Standby:
    """A pool that is opened when it is asked, and again after it was put down."""

    def __init__(self, settings: ClusterSettings, spec: EmbedderSpec) -> None:
        """spec: settled for where the pool will run."""
        self._settings, self.spec = settings, spec
        self._stack = ExitStack()
        self._pool: Embeds | None = None

    @classmethod
    @contextmanager
    def of(cls, settings: ClusterSettings, spec: EmbedderSpec) -> Iterator[Standby]:
        """Put down at the end. Starts nothing yet but, with actors, looks at the cluster. Raises ConfigError."""
        if parse_actors(settings.actors) == (0, 0):
            gpu = models.default_device() == "cuda"
        else:
            from llmemb_ray.pipeline.shape import cluster

            with cluster(settings) as shape:
                gpu = shape.on_gpu
        standby = cls(settings, spec.on(gpu))
        try:
            yield standby
        finally:
            standby.put_down()

    def encode(self, texts: Sequence[str], *, role: Role = "document", representation: Representation | None = None) -> Floats:
        from llmemb_ray.pipeline.pool import pool

        if self._pool is None:
            self._pool = self._stack.enter_context(pool(self._settings, self.spec))
        return self._pool.encode(texts, role=role, representation=representation)

    def put_down(self) -> None:
        """Ends the actors, or drops the model of this process."""
        self._pool = None
        self._stack.close()


@dataclass(frozen=True)
class _Indexed:
    documents: Any
    task_metadata: Any
    split: str
    subset: str


class Searcher(Encoder):
    """An encoder that also indexes and searches.

    job_documents: from so many documents on, the embedding job does the work; settings: of that job's model and actors;
    place: URL prefix of corpora and runs; put_down: called before the job or a search on the cluster wants the resources of the actors.
    """

    def __init__(
        self, embeds: Embeds, settings: EvaluateSettings, place: str, *, job_documents: int, put_down: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        super().__init__(embeds, **options)
        self._settings, self._place, self._job_documents, self._put_down = settings, place.rstrip("/"), job_documents, put_down
        self._indexed: _Indexed | None = None

    def index(self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> None:
        """Takes the corpus; it is embedded when it is known how it is searched."""
        self._indexed = _Indexed(corpus, task_metadata, hf_split, hf_subset)

    def search(self, queries: Any, *, top_k: int, top_ranked: Any = None, **asked: Any) -> dict[str, dict[str, float]]:
        """Query id → document id → cosine of the ``top_k`` best documents, or of those that ``top_ranked`` names for the query.

        Raises InputError, and what the embedding job raises.
        """
        assert self._indexed is not None, "mteb indexes before it searches"
        if top_ranked is None and len(self._indexed.documents) >= self._job_documents:
            run = self._run(self._indexed)
            self.rejected += sum(commit.rejected for commit in run.commits)
            return self._search_run(run, queries, top_k=top_k, **asked)
        from mteb.models.search_wrappers import SearchEncoderWrapper

        wrapper = SearchEncoderWrapper(self)
        index = self._indexed
        given = {name: asked[name] for name in ("encode_kwargs", "num_proc") if name in asked}
        wrapper.index(index.documents, task_metadata=index.task_metadata, hf_split=index.split, hf_subset=index.subset, **given)
        found: dict[str, dict[str, float]] = wrapper.search(queries, top_k=top_k, top_ranked=top_ranked, **asked)
        return found

    def _search_run(
        self, run: Run, queries: Any, *, top_k: int, task_metadata: Any, hf_split: str, hf_subset: str, **asked: Any
    ) -> dict[str, dict[str, float]]:
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        batches = create_dataloader(queries, task_metadata=task_metadata, prompt_type=PromptType.query, **asked.get("encode_kwargs", {}))
        vectors = self.encode(batches, task_metadata=task_metadata, hf_split=hf_split, hf_subset=hf_subset, prompt_type=PromptType.query)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        if parse_actors(self._settings.actors) == (0, 0):
            table = exact.search_table(run, vectors, top_k=top_k)
        else:
            from llmemb_ray.connection import connected
            from llmemb_ray.search import cluster

            self._put_down()
            with connected(self._settings.ray_address):
                table = cluster.search_table(run, vectors, top_k=top_k)
        found: dict[str, dict[str, float]] = {query: {} for query in queries["id"]}
        ids = list(found)
        for query, document, score in zip(table["query"].to_pylist(), table["id"].to_pylist(), table["score"].to_pylist(), strict=True):
            found[ids[query]][document] = score
        return found

    def _run(self, indexed: _Indexed) -> Run:
        """The corpus embedded; a run that stands there finished is read as it is."""
        from mteb.types import PromptType

        from llmemb_ray.pipeline import job

        # Normalised: the search over shards ranks by inner product.
        representation = replace(self.representation(indexed.task_metadata, PromptType.document), normalize=True)
        corpus = self._write(indexed)
        space = replace(self._spec, representation=representation).space.digest
        engine = {name: getattr(self._settings, name) for name in ("backend", "compute_dtype", "quantization")}
        output = f"{self._place}/vectors/{corpus.rpartition('/')[2]}-{digest([space, engine])[:12]}"
        given = {name: getattr(self._settings, name) for name in self._settings.model_fields_set & ClusterSettings.model_fields.keys()}
        given = {name: value for name, value in given.items() if name not in _SAID_BY_THE_REPRESENTATION}
        self._put_down()
        with tempfile.TemporaryDirectory(prefix="llmemb-mteb-") as directory:
            given |= {"representation": str(representation.save(directory)), "input": [corpus], "output": output, "id_column": "id", "text_column": "text"}
            job.run(EmbedSettings.make(given | {"max_reject_rate": 1}))  # As in retrieval: rejects are counted and are no results.
        return Run(Storage(absolute(output), self._settings.access))

    def _write(self, indexed: _Indexed) -> str:
        """The corpus as Parquet (id, text), and the directory's URL. What stands there whole is left alone: the same name is the same data."""
        metadata, documents = indexed.task_metadata, indexed.documents
        source = [dict(metadata.dataset), indexed.split, indexed.subset, len(documents)]
        name = f"{metadata.name}-{indexed.subset}-{indexed.split}-{digest(source)[:12]}".replace("/", "_")
        storage = Storage(absolute(f"{self._place}/corpora/{name}"), self._settings.access)
        for number, start in enumerate(range(0, len(documents), FILE_ROWS)):
            path = f"part-{number:05d}.parquet"
            if not storage.exists(path):
                sink = pa.BufferOutputStream()
                pq.write_table(
                    _documents(documents.select(range(start, min(start + FILE_ROWS, len(documents)))), metadata.name),
                    sink,
                    row_group_size=ROW_GROUP,
                    compression="zstd",
                )
                storage.put(path, sink.getvalue().to_pybytes())
        return f"{self._place}/corpora/{name}"


def _documents(rows: Any, task: str) -> pa.Table:
    """id and text, as mteb joins a document's title and text."""

    def texts() -> Iterator[str]:
        titles = rows["title"] if "title" in rows.column_names else [None] * len(rows)
        for row, (title, text) in enumerate(zip(titles, rows["text"], strict=True)):
            if text is None:
                raise InputError(f"mteb task {task}: document {rows['id'][row]!r} has no text")
            yield f"{title} {text}".strip() if title else text.strip()

    return pa.table({"id": pa.array(rows["id"], pa.string()), "text": pa.array(texts(), pa.string())})
