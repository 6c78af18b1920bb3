"""Every setting, once: its type, default, help text and the place in the command's help where it stands.

Invariant: this module is the one place that refuses a setting by itself. Command line, YAML file and Python
calls all end in these models; the command line's options are made from their fields. It imports no torch,
no ray, no transformers.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmemb_ray.engines import OWNED_ENGINE_ARGS, TITLES, Quantization, refusals
from llmemb_ray.errors import ConfigError
from llmemb_ray.representation.cleaning import Cleaning
from llmemb_ray.representation.representation import Pooling, Representation, Role, preset
from llmemb_ray.representation.templates import Demonstration
from llmemb_ray.storage import Access, redact


def setting(default: Any, help: str, *, panel: str, ge: float | None = None, gt: float | None = None, le: float | None = None, **extra: Any) -> Any:
    """A field with its help text, the panel of the command's help it belongs to, and its bounds."""
    return Field(default, description=help, ge=ge, gt=gt, le=le, json_schema_extra={"panel": panel, **extra})


class Settings(BaseModel):
    """Base: frozen, unknown names refused, errors as ConfigError in the user's words."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def make(cls, values: dict[str, Any]) -> Self:
        """Checks ``values``. Raises ConfigError naming each bad setting."""
        try:
            return cls(**values)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                name = ".".join(str(part) for part in problem["loc"]) or "settings"
                if problem["type"] == "extra_forbidden":
                    lines.append(f"{name}: there is no such setting")
                elif problem["type"] == "missing":
                    lines.append(f"{name}: must be given")
                else:
                    lines.append(f"{name}: {problem['msg'].removeprefix('Value error, ')}")
            raise ConfigError("; ".join(lines)) from None


class StorageSettings(Settings):
    endpoint_url: str | None = setting(None, "Endpoint of an S3-compatible store; else AWS_ENDPOINT_URL.", panel="Storage")
    storage_options: dict[str, Any] = setting(
        {},
        "Options for fsspec's file system, in YAML or by --set storage_options.NAME=VALUE; by protocol if need be ({s3: {…}}). Not recorded.",
        panel="Storage",
    )
    storage_retry_seconds: float = setting(300.0, "How long a storage operation is retried before it fails.", panel="Storage", gt=0)

    @property
    def access(self) -> Access:
        return Access(endpoint_url=self.endpoint_url, options=dict(self.storage_options), retry_seconds=self.storage_retry_seconds)


class ModelSettings(StorageSettings):
    """A model and how it represents a text."""

    model: str = setting(..., "Hub id, local directory or URL (s3://…) of a decoder-only model.", panel="Model")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model; resolved to a commit once.", panel="Model")
    adapter: str | None = setting(None, "PEFT adapter: hub id, directory or URL.", panel="Model")
    backend: Literal["auto", "hf", "vllm"] = setting(
        "auto", "Engine: hf is transformers; auto is vllm where it is installed and its vectors of the model were compared, else hf.", panel="Model"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the model; auto is bfloat16 on CUDA, else float32.", panel="Model"
    )
    quantization: Quantization = setting("none", "Weight format; hf: nf4, llm.int8; vllm: the others (docs/backends.md).", panel="Model")
    tensor_parallel: int = setting(1, "GPUs that a model's layers are split over, all on one node (vllm).", panel="Model", ge=1)
    engine_arg: list[str] = setting([], "Further argument KEY=VALUE of vLLM's engine, value in YAML; repeatable.", panel="Model")
    token_budget: int | None = setting(None, "Tokens in one forward pass; found while working (hf) or set by device (vllm) if not given.", panel="Model", ge=1)
    trust_remote_code: bool = setting(False, "Run the Python code that the model's repository brings.", panel="Model")
    allow_pickle: bool = setting(False, "Load pickled weights (.bin), which can run code, where there are no safetensors.", panel="Model")

    representation: str | None = setting(None, "File llmemb.json, or a directory with one; options given beside it win.", panel="Representation")
    prompt: str = setting("prompteol", "prompteol, prompteol-icl, e5, none, or a template with {text}.", panel="Representation")
    demo: list[str] = setting([], "Demonstration 'sentence=>Word' for prompteol-icl; repeatable.", panel="Representation")
    instruction: str | None = setting(None, "Task instruction for prompt e5; applies to the role embedded.", panel="Representation")
    clean: Cleaning = setting("none", "Text preparation; senteval is that of paper 1's evaluation.", panel="Representation")
    pooling: Pooling = setting("last", "Which states make the vector.", panel="Representation")
    layer: int = setting(-1, "Hidden layer; -1 is the state after the final norm.", panel="Representation")
    normalize: bool = setting(True, "Divide vectors by their L2 norm.", panel="Representation")
    dimensions: int | None = setting(None, "Keep the first N dimensions.", panel="Representation", ge=1)
    max_tokens: int | None = setting(
        None, "Longest prompt in tokens; the text of a longer one is cut. Default: the model's positions, at most 4096.", panel="Representation", ge=1
    )
    append_eos: bool | None = setting(None, "End prompts with the EOS token; default: for prompt e5.", panel="Representation")
    role: Role = setting("document", "Role in which texts are embedded.", panel="Representation")

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        arguments = self.engine_args
        for name in arguments.keys() & OWNED_ENGINE_ARGS.keys():
            way_out = f"set {OWNED_ENGINE_ARGS[name]} instead" if OWNED_ENGINE_ARGS[name] else "leave it out"
            raise ValueError(f"engine_arg: {name} is settled by llmemb; {way_out}")
        if self.backend != "auto":
            refused = refusals(self.backend, **self.engine(), pooling=self.pooling, layer=self.layer)
        else:
            both: list[list[str]] = [refusals(backend, **self.engine(), pooling=self.pooling, layer=self.layer) for backend in TITLES]
            refused = [line for lines in both for line in lines] if all(both) else []
        if refused:
            raise ValueError("; ".join(refused))
        return self

    @property
    def engine_args(self) -> dict[str, Any]:
        """``engine_arg`` as a mapping. Raises ValueError."""
        arguments = {}
        for text in self.engine_arg:
            name, equals, value = text.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"engine_arg: {text!r} is not KEY=VALUE with the name of an argument of vLLM's engine, such as max_num_seqs=64")
            try:
                arguments[name] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ValueError(f"engine_arg: the value of {name} is not YAML") from None
        return arguments

    def engine(self) -> dict[str, Any]:
        """The settings that a backend may refuse, besides those of the representation."""
        return {"quantization": self.quantization, "tensor_parallel": self.tensor_parallel, "engine_args": self.engine_args}

    _PROMPT_FIELDS: ClassVar[frozenset[str]] = frozenset({"prompt", "demo", "instruction", "clean"})
    _OTHER_FIELDS: ClassVar[tuple[str, ...]] = ("pooling", "layer", "normalize", "dimensions", "max_tokens")

    def build_representation(self) -> Representation:
        """The representation that these settings describe. Raises ConfigError."""
        given = self.model_fields_set
        values: dict[str, Any] = {}
        if self.representation is not None:
            base = Representation.load(self.representation)
            values = {name: getattr(base, name) for name in Representation.__dataclass_fields__}
        if self.representation is None or given & self._PROMPT_FIELDS:
            demonstrations = tuple(Demonstration.parse(demo) for demo in self.demo)
            values["document"], values["query"], values["append_eos"] = preset(
                self.prompt, demonstrations=demonstrations, instruction=self.instruction, role=self.role, clean=self.clean
            )
        for name in self._OTHER_FIELDS:
            if self.representation is None or name in given:
                values[name] = getattr(self, name)
        if self.append_eos is not None:
            values["append_eos"] = self.append_eos
        return Representation(**values)


class EmbedSettings(ModelSettings):
    """The embedding job."""

    input: list[str] = setting(..., "Parquet file, directory or glob; local or URL; several of them.", panel="Corpus", argument=True)
    output: str = setting(..., "Directory or URL prefix of the run.", panel="Corpus", argument=True)
    text_column: str = setting("text", "Column of the text (a.b for a nested one), or a template such as '{title} {text}'.", panel="Corpus")
    id_column: str | None = setting(None, "Column of the id; default: 'id' where there is one.", panel="Corpus")
    keep_columns: list[str] = setting([], "Columns copied into the shards, separated by commas.", panel="Corpus", commas=True)
    filter: str | None = setting(None, "SQL condition on the columns; other rows are left out (needs duckdb).", panel="Corpus")
    limit_rows: int | None = setting(None, "Only the first N rows of the corpus.", panel="Corpus", ge=1)
    skip_bad_files: bool = setting(False, "Leave out files that cannot be read, and name them in the receipt.", panel="Corpus")
    chunk_tokens: int | None = setting(None, "Cut texts into chunks of at most N tokens, at sentence or word borders.", panel="Corpus", ge=1)
    chunk_overlap: int = setting(0, "Tokens that a chunk repeats from the one before; at most half of chunk_tokens.", panel="Corpus", ge=0)
    chunk_pool: Literal["none", "mean"] = setting("none", "One vector a chunk (none), or one a document: the mean of its chunks' vectors.", panel="Corpus")
    dedup: Literal["none", "exact"] = setting("none", "exact: embed identical prompts once and copy the vector.", panel="Corpus")
    append: bool = setting(False, "Add the files of INPUT that the finished run in OUTPUT does not have yet.", panel="Corpus")
    reuse: str | None = setting(None, "Earlier run in the same space: copy the vectors of prompts that it has already.", panel="Corpus")

    dtype: Literal["float32", "float16", "int8", "ubinary"] = setting("float32", "Precision of the vectors written.", panel="Output")
    centre: bool = setting(False, "ubinary: take the bits against the mean of a sample, not against zero.", panel="Output")
    calibration: str | None = setting(
        None, "int8, centred ubinary: take the ranges of this run, not of a sample of the corpus, so that both runs' codes mean the same.", panel="Output"
    )
    overwrite: bool = setting(False, "Delete the run that stands in OUTPUT first.", panel="Output")
    max_reject_rate: float = setting(0.01, "Largest share of rejected rows for exit code 0.", panel="Output", ge=0, le=1)
    reject_floor: int = setting(10, "So many rejected rows never fail a run, however small it is.", panel="Output", ge=0)
    max_nan: int = setting(0, "Largest number of rows whose vector is not finite for exit code 0.", panel="Output", ge=0)
    rows_per_unit: int | None = setting(None, "Rows in a unit; default: about a minute of one actor, at most 128 MB.", panel="Output", ge=1)

    actors: str = setting(
        "auto", "Actors that hold a model: N, MIN:MAX, auto (all GPUs, or a few per CPU node), or 0 for this process without Ray.", panel="Cluster"
    )
    gpus_per_actor: float | None = setting(None, "GPUs of an actor; default 1 where the cluster has GPUs, else 0.", panel="Cluster", ge=0)
    cpus_per_actor: float | None = setting(None, "CPU cores of an actor; default: most of a CPU node, at most 8.", panel="Cluster", gt=0)
    max_attempts: int = setting(3, "Attempts at a unit whose actor dies before it is halved to find the row at fault.", panel="Cluster", ge=1)
    retry_wait: float = setting(
        1.0, "Seconds before a unit whose actor died is tried again; twice as long after each further death, at most 60.", panel="Cluster", ge=0
    )
    ray_address: str | None = setting(None, "Ray cluster; default: RAY_ADDRESS, else a Ray of its own on this machine.", panel="Cluster")
    window_units: int = setting(4000, "Units in one Ray Data execution; bounds what the driver holds.", panel="Cluster", ge=1)
    deadline: str | None = setting(None, "Stop cleanly in time for this: 90m, 6h, 2d, or 2026-12-31T06:00 (local time unless it says).", panel="Cluster")
    max_cost: float | None = setting(None, "Stop cleanly before this command has cost so much; needs a price.", panel="Cluster", gt=0)
    price: float | None = setting(None, "Price of one GPU for an hour (of one actor, where there are no GPUs), in any currency.", panel="Cluster", gt=0)

    check_parity: int | None = setting(
        None, "Compare so many rows with plain float32 inference first, and stop if they differ beyond the bounds (docs/parity.md).", panel="Check", ge=2
    )
    accept_backend_change: bool = setting(
        False, "Continue a run on another backend than it was begun with, if its rows agree (needs check_parity).", panel="Check"
    )

    @field_validator("actors", mode="before")
    @classmethod
    def _number_of_actors(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        parse_actors(self.actors)
        if not self.input:
            raise ValueError("input: no file, directory or glob given")
        if self.chunk_tokens is None and (self.chunk_overlap or self.chunk_pool != "none"):
            raise ValueError("chunk_overlap and chunk_pool do nothing without chunk_tokens; give it")
        if self.chunk_tokens is not None and self.chunk_overlap > self.chunk_tokens // 2:
            raise ValueError(f"chunk_overlap: {self.chunk_overlap} is more than half of chunk_tokens={self.chunk_tokens}")
        if self.centre and self.dtype != "ubinary":
            raise ValueError(f"centre: is for dtype ubinary; with {self.dtype} it does nothing")
        if self.calibration and not (self.dtype == "int8" or self.centre):
            raise ValueError("calibration: is for dtype int8, or ubinary with centre; else nothing is calibrated")
        if self.tensor_parallel > 1 and self.gpus_per_actor not in (None, 0, self.tensor_parallel):
            raise ValueError(f"gpus_per_actor: tensor_parallel={self.tensor_parallel} takes as many GPUs for an actor; leave gpus_per_actor out")
        if self.backend == "vllm" and (self.gpus_per_actor or 0) > self.tensor_parallel:
            raise ValueError(f"gpus_per_actor: vLLM would use {self.tensor_parallel} of {self.gpus_per_actor:g} GPUs; set tensor_parallel instead")
        if self.accept_backend_change and (self.check_parity is None or self.append):
            raise ValueError("accept_backend_change: needs check_parity, the number of rows that both backends are compared on, and goes without append")
        if self.append and self.overwrite:
            raise ValueError("append and overwrite exclude each other")
        if self.append and self.limit_rows:
            raise ValueError("limit_rows: the first rows of a corpus that grows are not one set; leave it out with append")
        if self.max_cost is not None and self.price is None:
            raise ValueError("max_cost: needs the price of a GPU hour; give price")
        if self.deadline is not None:
            parse_deadline(self.deadline, now=0.0)
        return self

    def recorded(self) -> dict[str, Any]:
        """The settings as they may stand in a plan: without storage options, URLs redacted."""
        data = self.model_dump(mode="json", exclude={"storage_options"})
        data["input"] = [redact(url) for url in self.input]
        for name in ("output", "endpoint_url", "model", "adapter", "ray_address", "reuse", "calibration"):
            if data[name]:
                data[name] = redact(data[name])
        return data


class ParitySettings(ModelSettings):
    """The engines compared with one-by-one inference."""

    input: list[str] = setting([], "Parquet file, directory or glob to sample; default: texts that are built in.", panel="Corpus", argument=True)
    text_column: str = setting("text", "Column of the text (a.b for a nested one), or a template such as '{title} {text}'.", panel="Corpus")
    filter: str | None = setting(None, "SQL condition on the columns; other rows are left out (needs duckdb).", panel="Corpus")
    sample: int = setting(64, "Rows compared, from places spread evenly over INPUT; of the built-in texts the first ones.", panel="Check", ge=2)
    seed: int = setting(0, "Seed of the shuffled order.", panel="Check", ge=0)
    reference_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Precision of the inference compared with; bfloat16 for a model too large for float32.", panel="Check"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.input and self.model_fields_set & {"text_column", "filter"}:
            raise ValueError("text_column and filter do nothing without INPUT; give it")
        return self


class PlanSettings(EmbedSettings):
    """The embedding job, and what its cost is estimated with."""

    gpu: str | None = setting(None, "GPU to reckon with: L4, A10G, A100, H100, H200 or B200; default: a line for each.", panel="Estimate")
    throughput: float | None = setting(
        None, "Prompt tokens that one GPU embeds in a second (one actor, where there are no GPUs), measured; in place of a GPU's rate.", panel="Estimate", gt=0
    )
    utilization: str = setting("0.3:0.6", "Share of its dense bf16 rate that a GPU reaches: X, or LOW:HIGH.", panel="Estimate")
    sample_rows: int | None = setting(None, "Rows read to estimate tokens; default: 2000, fewer of long documents.", panel="Estimate", ge=1)

    @field_validator("utilization", mode="before")
    @classmethod
    def _utilization(cls, value: Any) -> Any:
        parse_utilization(str(value))
        return str(value)


class SearchSettings(StorageSettings):
    """Exact search over the shards of a run."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Search", argument=True)
    text: list[str] = setting([], "Query texts.", panel="Search", argument=True)
    top_k: int = setting(5, "Results for each query.", panel="Search", ge=1)
    model: str | None = setting(None, "Where the run's model is now, if not where it was; it must be the same.", panel="Search")
    no_text: bool = setting(False, "Show no texts of the rows found; they are read back from the corpus.", panel="Search")
    queries: str | None = setting(None, "File of queries in place of TEXT: .parquet, .jsonl, .csv, .tsv, or .txt with one a line.", panel="Queries")
    query_column: str | None = setting(None, "Column of the queries; default: query, else text.", panel="Queries")
    query_id_column: str | None = setting(None, "Column of the queries' ids; default: query_id, id or _id where there is one.", panel="Queries")
    out: str | None = setting(None, "Write the results to this Parquet file, one row a result.", panel="Queries")
    overwrite: bool = setting(False, "Replace the file that out names.", panel="Queries")
    on_cluster: bool = setting(False, "Spread the shards over a Ray cluster.", panel="Cluster")
    ray_address: str | None = setting(
        None, "Ray cluster to search on; with on_cluster alone: RAY_ADDRESS, else a Ray of its own on this machine.", panel="Cluster"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.text and self.queries is None:
            raise ValueError("TEXT must be given, or a file of queries: the arguments are RUN TEXT..., or RUN and the option queries")
        if self.text and self.queries is not None:
            raise ValueError("TEXT and queries exclude each other; write all queries into the file")
        if self.queries is None and (self.query_column or self.query_id_column):
            raise ValueError("query_column and query_id_column do nothing without queries; give the file")
        if self.overwrite and self.out is None:
            raise ValueError("overwrite: does nothing without out")
        return self


class ExportSettings(StorageSettings):
    """The vectors of a run in the form of another program."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Export", argument=True)
    dest: str = setting(..., "Local directory to write; it must be empty or not exist.", panel="Export", argument=True)
    to: Literal["npy", "faiss", "lance", "hf"] = setting(..., "Form: NumPy file, faiss index, Lance dataset, Hugging Face dataset.", panel="Export")
    dtype: Literal["float32", "float16"] | None = setting(None, "Precision of the vectors exported; default float32.", panel="Export")
    raw: bool = setting(False, "Export values as they are stored: codes and bits are not turned back into vectors.", panel="Export")
    faiss_factory: str | None = setting(
        None, "Index of faiss.index_factory, such as IVF1024,SQ8, trained on a sample; default: the exact Flat.", panel="Export"
    )
    overwrite: bool = setting(False, "Replace an earlier export that stands in DEST.", panel="Export")
    allow_unfinished: bool = setting(False, "Export what is committed of a run that is not finished.", panel="Export")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.raw and self.dtype is not None:
            raise ValueError("raw and dtype exclude each other: raw values keep the dtype of the run")
        if self.faiss_factory is not None and self.to != "faiss":
            raise ValueError(f"faiss_factory: is for faiss; with {self.to} it does nothing")
        return self


class ReportSettings(StorageSettings):
    """One page about a run."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Report", argument=True)
    out: str = setting("report.html", "Page to write, local or URL; one that is there is replaced.", panel="Report")
    no_text: bool = setting(False, "Leave out all texts of the corpus; they are else read back from it.", panel="Report")
    sample: int = setting(2000, "Vectors that health and map are made from, spread evenly over the run.", panel="Report", ge=1, le=10_000)


class VerifySettings(StorageSettings):
    """The check of a run from its files alone."""

    run: str = setting(..., "Directory or URL prefix of a run.", panel="Check", argument=True)
    level: Literal["quick", "sample", "full"] = setting(
        "full", "quick: names, sizes and counts; sample: also the contents of some units; full: all contents.", panel="Check", flags=True
    )
    against: list[str] = setting([], "Compare with the corpus itself: its files, rows and ids.", panel="Check")
    allow_duplicate_ids: bool = setting(False, "Report ids that stand in several rows without failing.", panel="Check")


def parse_actors(text: str) -> tuple[int, int] | None:
    """``(least, most)`` of ``N`` or ``MIN:MAX``; None for ``auto``. Raises ValueError."""
    if text == "auto":
        return None
    try:
        low, _, high = text.partition(":")
        least, most = int(low), int(high or low)
    except ValueError:
        raise ValueError(f"actors: {text!r} is none of auto, 0, N, MIN:MAX") from None
    if least < 0 or most < least or (most > 0 and least == 0):
        raise ValueError(f"actors: {text!r} must be 0, N or MIN:MAX with 1 ≤ MIN ≤ MAX")
    return least, most


def parse_utilization(text: str) -> tuple[float, float]:
    """``(least, most)`` of ``X`` or ``LOW:HIGH``, shares of 1. Raises ValueError."""
    try:
        low, _, high = text.partition(":")
        least, most = float(low), float(high or low)
    except ValueError:
        raise ValueError(f"{text!r} is neither a share such as 0.4 nor a range such as 0.3:0.6") from None
    if not 0 < least <= most <= 1:
        raise ValueError(f"{text!r}: shares lie above 0 and up to 1, the lower first (0.3:0.6)")
    return least, most


_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")
_DURATION_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def is_duration(text: str) -> bool:
    """Whether a deadline is so long from now, and not a time."""
    return _DURATION.fullmatch(text.strip()) is not None


def parse_deadline(text: str, *, now: float) -> float:
    """Unix time of a deadline: so long after ``now``, or a date and time. Raises ValueError."""
    if is_duration(text):
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
        return now + sum(float(number) * _DURATION_SECONDS[unit] for number, unit in parts)
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        raise ValueError(f"deadline: {text!r} is neither a duration such as 90m, 6h or 1d12h nor a time such as 2026-12-31T06:00") from None
