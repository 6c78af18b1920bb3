"""The vectors that tasks want, made by the embedding job: same actors, same representation, same exactness, and it can be resumed.

Invariant: all texts of all tasks that share a role and an instruction are one corpus, each text in it once, and one run
under OUT/vectors; the run's name is a digest of its texts and of all that decides their vectors, so that a run that is
there is the one wanted. Texts are embedded without normalisation (classifiers see the states, as in paper 1; cosines
divide by the norms), unless the settings ask for it.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmemb_ray.config import EmbedSettings, EvaluateSettings
from llmemb_ray.embedders.beside import representation_of
from llmemb_ray.embedders.embedder import EmbedderSpec
from llmemb_ray.errors import InputError, RunFailed
from llmemb_ray.evaluation.suite import Corpus, Embedded, Floats, Need, Texts
from llmemb_ray.pipeline import job
from llmemb_ray.representation.representation import Role
from llmemb_ray.representation.space import digest
from llmemb_ray.shards.receipt import PATH as RECEIPT
from llmemb_ray.shards.run import Run
from llmemb_ray.storage import Storage, absolute

ROW_GROUP = 8192
"""Rows: units are cut inside row groups."""

ENGINE = ("backend", "compute_dtype", "quantization")

IN_MEMORY_BYTES = 2**30
"""A larger matrix of distinct texts is kept in a temporary file."""

Group = tuple[Role, str | None, bool]
"""Role, instruction of the task, and whether one of the user's is left out."""


@dataclass
class Counts:
    """wanted: texts asked for; distinct: texts embedded; tokens: of their prompts; seconds: that embedding took. Corpora included."""

    wanted: int = 0
    distinct: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Vectors:
    """What some tasks need, embedded. Used as a context: ``with Vectors(…) as vectors: vectors.of(need)``."""

    def __init__(self, settings: EvaluateSettings, spec: EmbedderSpec, out: str) -> None:
        """out: directory or URL prefix of the evaluation; spec: of its embedder, ``max_tokens`` settled."""
        self._settings, self._spec, self._out = settings, spec, out
        self._rows: dict[Group, dict[str, int]] = {}
        self._matrices: dict[Group, Floats] = {}
        self.counts = Counts()
        self.engine: dict[str, Any] | None = None
        """Of the runs: ``ENGINE``."""

    @contextmanager
    def embedded(self, needs: Iterable[Need]) -> Iterator[Vectors]:
        """Embeds all Texts among ``needs``, a run for each role and instruction. Raises what the job raises, InputError for a text without a vector."""
        for need in needs:
            if isinstance(need, Texts):
                rows = self._rows.setdefault(self._group(need), {})
                self.counts.wanted += len(need.texts)
                for text in need.texts:
                    rows.setdefault(text, len(rows))
        with tempfile.TemporaryDirectory(prefix="llmemb-vectors-") as directory:
            for number, (group, rows) in enumerate(self._rows.items()):
                self.counts.distinct += len(rows)
                self._matrices[group] = self._matrix(group, list(rows), Path(directory) / f"{number}.npy")
            yield self
            self._matrices.clear()

    def of(self, need: Need) -> Embedded:
        """What a need became. A Corpus is embedded now, unless it was before."""
        if isinstance(need, Corpus):
            return self._corpus(need)
        group = self._group(need)
        rows = self._rows[group]
        return self._matrices[group][[rows[text] for text in need.texts]]

    def _group(self, need: Texts | Corpus) -> Group:
        taken = self._settings.prompt == "e5" and self._settings.representation is None and self._settings.instruction is None
        return need.role, need.instruction if taken and self._settings.task_instructions else None, need.plain and self._settings.instruction is not None

    def _matrix(self, group: Group, texts: list[str], path: Path) -> Floats:
        run = self._run_of_texts(group, texts)
        shape = (len(texts), run.plan.dimension)
        large = 4 * shape[0] * shape[1] > IN_MEMORY_BYTES
        matrix: Floats = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape) if large else np.empty(shape, np.float32)
        seen = np.zeros(len(texts), np.bool_)
        for _, table in run.shards(["id", "embedding"]):
            rows = table["id"].to_numpy()
            matrix[rows] = run.precision.decode(table["embedding"])
            seen[rows] = True
        if not seen.all():
            raise RunFailed(f"{run.url} holds {int(seen.sum())} of {len(texts)} vectors; delete it and run the command again")
        assert run.receipt is not None
        self.counts.tokens += run.receipt.tokens
        return matrix

    def _run_of_texts(self, group: Group, texts: list[str]) -> Run:
        fingerprint = hashlib.sha256()
        for text in texts:
            fingerprint.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
        settings = self._job(group, normalize=self._settings.normalize if "normalize" in self._settings.model_fields_set else False)
        name = f"texts-{self._name(settings, fingerprint.hexdigest())}"
        corpus = Storage(absolute(f"{self._out}/texts"), self._settings.access)
        if not corpus.exists(f"{name}.parquet"):
            sink = pa.BufferOutputStream()
            table = pa.table({"id": pa.array(range(len(texts)), pa.int64()), "text": pa.array(texts, pa.string())})
            pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
            corpus.put(f"{name}.parquet", sink.getvalue().to_pybytes())
        run = self._embed(settings, [f"{self._out}/texts/{name}.parquet"], name, max_reject_rate=1)
        for rejects in run.rejects():
            reject = rejects.to_pylist()[0]
            text = texts[reject["source_row"]]
            raise InputError(f"a text cannot be embedded, so that its task has no score: {text[:80]!r}: {reject['reason']}: {reject['detail']}")
        return run

    def _corpus(self, need: Corpus) -> Run:
        settings = self._job(self._group(need), normalize=None)
        name = f"{need.name}-{self._name(settings, digest([need.files, need.text_column]))}"
        run = self._embed(settings, need.files, name, text_column=need.text_column, max_reject_rate=1)
        assert run.receipt is not None
        self.counts.wanted += run.receipt.rows_read
        self.counts.distinct += run.receipt.rows_embedded
        self.counts.tokens += run.receipt.tokens
        return run

    def _job(self, group: Group, *, normalize: bool | None) -> dict[str, Any]:
        """The settings of a job that embeds a group, without input and output. normalize: None leaves it as it is set."""
        settings = self._settings
        given: dict[str, Any] = {name: getattr(settings, name) for name in settings.model_fields_set & EmbedSettings.model_fields.keys()}
        role, instruction, plain = group
        if plain:
            given.pop("instruction", None)
        return given | {"role": role} | ({"instruction": instruction} if instruction else {}) | ({} if normalize is None else {"normalize": normalize})

    def _name(self, job_settings: dict[str, Any], texts: str) -> str:
        """A digest of texts and of what decides their vectors, cut to a name."""
        made = EmbedSettings.make(job_settings | {"input": ["-"], "output": "-"})
        representation = representation_of(made)
        if representation.max_tokens is None:
            representation = replace(representation, max_tokens=self._spec.representation.max_tokens)
        space = replace(self._spec, representation=representation).space
        engine = {name: getattr(made, name) for name in ENGINE}
        return digest([texts, space.to_dict(), engine, made.role])[:16]

    def _embed(self, settings: dict[str, Any], files: Sequence[str], name: str, **more: Any) -> Run:
        output = f"{self._out}/vectors/{name}"
        storage = Storage(absolute(output), self._settings.access)
        started = time.monotonic()
        if not storage.exists(RECEIPT) or Run(storage).receipt is None:
            job.run(EmbedSettings.make(settings | {"input": list(files), "output": output, "id_column": "id"} | more))
        run = Run(storage)
        self.counts.seconds += time.monotonic() - started
        self.engine = {name: run.plan.engine[name] for name in ENGINE}
        return run
