"""The plan: what a run is to do, settled before it starts and kept in OUT.

Invariant: a plan stands for one run key; its units follow from its files alone, so a resumed run has the
same units. The plan is plain data: it needs no cluster, no model and no corpus to be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from llmemb_ray import parquet
from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.units import Piece, PlannedFile, Unit
from llmemb_ray.errors import NotFound, OutputError, RunMismatch
from llmemb_ray.representation.representation import Representation
from llmemb_ray.representation.space import differences, digest
from llmemb_ray.shards import records
from llmemb_ray.shards.precision import Calibration, Dtype, Precision
from llmemb_ray.storage import Storage

RECORD = "_llmemb/plan/plan.json"
FILES = "_llmemb/plan/files-{generation}.parquet"

FORMAT = 2
"""Version of the layout of OUT. A reader refuses a later one."""

_FILES_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("url", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
        ("group_rows", pa.list_(pa.int64())),
        ("rows", pa.int64()),
        ("rows_per_unit", pa.int64()),
        ("partitions", pa.string()),
        ("problem", pa.string()),
        ("generation", pa.int32()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    files: list[PlannedFile]
    selection: Selection
    space: dict[str, Any]
    """The fields whose digest is the space."""
    engine: dict[str, Any]
    """Backend, compute dtype, weight quantisation, output precision and calibration: what the run key holds besides space and corpus."""
    corpus: dict[str, Any]
    """What decides which rows are embedded and how they are cut, besides the files."""
    role: str
    dimension: int
    dtype: Dtype
    earlier_run_keys: list[str] = field(default_factory=list)
    """Run keys of the generations before this one, the first first; each appended files to the one before, or changed its backend."""
    id_type: str | None = None
    kept_types: dict[str, str] = field(default_factory=dict)
    model_name: str = ""
    adapter_name: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """All settings of the run as given, secrets left out; only for the reader."""
    versions: dict[str, str] = field(default_factory=dict)
    created: float = 0.0

    @property
    def space_digest(self) -> str:
        return digest(self.space)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields whose digest is the run key."""
        return {"space": self.space, "engine": self.engine, "corpus": self.corpus}

    @property
    def run_key(self) -> str:
        return digest(self.identity)

    @property
    def generation(self) -> int:
        """How often files were appended or the backend was changed."""
        return len(self.earlier_run_keys)

    def run_keys_of(self, file: int) -> list[str]:
        """The run keys under which units of a file may have been embedded: from the generation that brought the file on."""
        return [*self.earlier_run_keys, self.run_key][self.files[file].generation :]

    @property
    def column_types(self) -> dict[str, str]:
        """Types of the id column and the kept columns by their names in the corpus."""
        return ({self.selection.id: self.id_type} if self.selection.id and self.id_type else {}) | self.kept_types

    @property
    def calibrates(self) -> bool:
        return Precision.calibrates(self.dtype, self.engine["centre"])

    def precision(self, calibration: Calibration | None) -> Precision:
        """How vectors are written. calibration: that of the run, where the plan ``calibrates``."""
        return Precision(
            dtype=self.dtype,
            dimension=self.dimension,
            normalized=self.representation.normalize,
            centre=self.engine["centre"],
            calibration=calibration,
        )

    @property
    def chunked(self) -> bool:
        """Whether the shards hold a row for each chunk of a text."""
        return self.corpus["chunk_tokens"] is not None and self.corpus["chunk_pool"] == "none"

    @property
    def representation(self) -> Representation:
        return Representation.from_dict(self.space["representation"])

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def pieces(self) -> Iterator[Piece]:
        for file in self.files:
            yield from file.pieces()

    def units(self) -> Iterator[Unit]:
        for file in self.files:
            yield from file.units()

    @property
    def bad_files(self) -> list[PlannedFile]:
        return [file for file in self.files if file.problem is not None]

    # -- in storage --------------------------------------------------------------------------------

    def save(self, storage: Storage) -> None:
        """Writes the files first and the record last: a plan without its record is none."""
        columns = [
            [file.index for file in self.files],
            [file.url for file in self.files],
            [file.size for file in self.files],
            [file.version for file in self.files],
            [list(file.group_rows) for file in self.files],
            [file.rows for file in self.files],
            [file.rows_per_unit for file in self.files],
            [json.dumps(file.partitions) for file in self.files],
            [file.problem for file in self.files],
            [file.generation for file in self.files],
        ]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _FILES_SCHEMA, strict=True)]
        files = parquet.to_bytes(pa.Table.from_arrays(arrays, schema=_FILES_SCHEMA))
        path = FILES.format(generation=self.generation)
        storage.put(path, files)
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "files"}
        record |= {"selection": asdict(self.selection), "format": FORMAT, "run_key": self.run_key, "space_digest": self.space_digest}
        record |= {"files": path, "file_count": len(self.files), "files_sha256": hashlib.sha256(files).hexdigest()}
        record = json.loads(json.dumps(record))
        record["digest"] = digest(record)
        storage.put(RECORD, json.dumps(record, indent=1, sort_keys=True).encode())

    @classmethod
    def load(cls, storage: Storage) -> Plan | None:
        """The plan in OUT; None where there is none. Raises OutputError for one that this version cannot read."""
        try:
            record = json.loads(storage.read(RECORD))
        except NotFound:
            return None
        except ValueError as error:
            raise OutputError(f"{storage.display(RECORD)} is not JSON: {error}; put back the file as it was, or use another output") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            layout = record.get("format") if isinstance(record, dict) else None
            raise OutputError(f"{storage.url} was written with layout {layout}; this version of llmemb_ray reads layout {FORMAT}")
        path_of_files = records.inside(record.get("files"), storage.display(RECORD))
        files = storage.read(path_of_files)
        for path, said, found in (
            (RECORD, record.pop("digest", None), digest(record)),
            (path_of_files, record.get("files_sha256"), hashlib.sha256(files).hexdigest()),
        ):
            if said != found:
                raise OutputError(f"{storage.display(path)} was altered since the run began; put back the file as it was, or use another output")
        return cls(
            files=[
                PlannedFile(**(row | {"group_rows": tuple(row["group_rows"]), "partitions": json.loads(row["partitions"])}))
                for row in parquet.read(files).to_pylist()
            ],
            selection=Selection(**(record["selection"] | {"keep": tuple(record["selection"]["keep"])})),
            **{name: record[name] for name in set(cls.__dataclass_fields__) - {"files", "selection"}},
        )

    def require_same(self, other: Plan, where: str) -> None:
        """Raises RunMismatch with every field in which ``other``, the plan asked for now, differs from this stored one."""
        if self.run_key == other.run_key:
            return
        fields = differences(other.identity, self.identity)
        lines = [f"  {name}: the run there has {_short(theirs)}, asked for now {_short(ours)}\n" for name, ours, theirs in fields]
        way_out = "Use another output, repeat the settings of that run, or delete it with overwrite."
        raise RunMismatch(f"{where} holds a run with another run key:\n{''.join(lines)}{way_out}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"
