"""Settings that several commands share: storage, the model with its representation, the actors that hold it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llmemb_ray.engines import OWNED_ENGINE_ARGS, TITLES, Quantization, refusals
from llmemb_ray.errors import ConfigError, NotFound
from llmemb_ray.representation.cleaning import Cleaning
from llmemb_ray.representation.representation import FILE_NAME, Form, Pooling, Representation, Role, is_e5, preset
from llmemb_ray.representation.templates import NONE, Demonstration
from llmemb_ray.storage import Access, locate, redact


def setting(
    default: Any,
    help: str,
    *,
    panel: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **extra: Any,
) -> Any:
    """A field with its help text, the panel of the command's help it belongs to, and its bounds."""
    return Field(default, description=help, ge=ge, gt=gt, le=le, lt=lt, json_schema_extra={"panel": panel, **extra})


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


class WeightsSettings(StorageSettings):
    """A model's weights."""

    model: str = setting(..., "Hub id, local directory or URL (s3://…) of a decoder-only model.", panel="Model")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model; resolved to a commit once.", panel="Model")
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Precision of the model; auto is bfloat16 on CUDA, else float32.", panel="Model"
    )
    trust_remote_code: bool = setting(False, "Run the Python code that the model's repository brings.", panel="Model")
    allow_pickle: bool = setting(False, "Load pickled weights (.bin), which can run code, where there are no safetensors.", panel="Model")


class RepresentationSettings(StorageSettings):
    """How a model represents a text."""

    representation: str | None = setting(None, "File llmemb.json, or a directory or URL prefix with one; options given beside it win.", panel="Representation")
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
    rope_theta: float | None = setting(
        None,
        "Base of the rotary positions in place of the model's own; with it max_tokens may go beyond the model's positions (paper 2: 100000).",
        panel="Representation",
        ge=1,
        le=1e12,
    )
    sliding_window: int | None = setting(
        None, "Tokens that a layer looks back, in place of the model's own sliding window; 0 for no window.", panel="Representation", ge=0
    )
    append_eos: bool | None = setting(None, "End prompts with the EOS token; default: for prompt e5.", panel="Representation")
    role: Role = setting("document", "Role in which texts are embedded.", panel="Representation")

    _PROMPT_FIELDS: ClassVar[frozenset[str]] = frozenset({"prompt", "demo", "instruction", "clean"})
    _OTHER_FIELDS: ClassVar[tuple[str, ...]] = ("pooling", "layer", "normalize", "dimensions", "max_tokens")

    def build_representation(self, beside: Representation | None = None) -> Representation:
        """The representation that these settings describe. Raises ConfigError.

        beside: what stands beside the model or its adapter: taken where the settings name no other, options win.
        """
        given = self.model_fields_set
        base = self._stored_representation(self.representation) if self.representation is not None else beside
        values: dict[str, Any] = {} if base is None else {name: getattr(base, name) for name in Representation.__dataclass_fields__}
        if base is None or given & self._PROMPT_FIELDS:
            own = self._beside(beside) if beside is not None and self.representation is None else None
            values["document"], values["query"], values["append_eos"] = own or preset(
                self.prompt,
                demonstrations=tuple(Demonstration.parse(demo) for demo in self.demo),
                instruction=self.instruction,
                role=self.role,
                clean=self.clean,
            )
        for name in self._OTHER_FIELDS:
            if base is None or name in given:
                values[name] = getattr(self, name)
        if self.append_eos is not None:
            values["append_eos"] = self.append_eos
        return Representation(**values)

    def _beside(self, base: Representation) -> tuple[Form, Form, bool] | None:
        """The forms of ``base`` with what is given of instruction and cleaning alone; None where another prompt is given."""
        given = self.model_fields_set
        document, query = base.document, base.query
        if "clean" in given:
            document, query = replace(document, clean=self.clean), replace(query, clean=self.clean)
        instructable = is_e5(base)
        if self.demo or (("prompt" in given) and not (instructable and self.prompt == "e5")):
            return None
        if self.instruction is None:
            return document, query, base.append_eos
        if not instructable:
            return None
        symmetric = self.role == "document" or document.template != NONE
        return preset("e5", instruction=self.instruction, role="document" if symmetric else "query", clean=query.clean)

    def _stored_representation(self, place: str) -> Representation:
        if "://" not in place:
            return Representation.load(place)
        url = place if place.endswith(".json") else f"{place.rstrip('/')}/{FILE_NAME}"
        storage, name = locate(url, self.access)
        try:
            return Representation.parse(storage.read(name), redact(url))
        except NotFound as error:
            raise ConfigError(f"representation {redact(url)} is not there") from error


class ModelSettings(RepresentationSettings, WeightsSettings):
    """A model that embeds: weights, adapter, engine and representation."""

    adapter: str | None = setting(None, "PEFT adapter: hub id, directory or URL.", panel="Model")
    backend: Literal["auto", "hf", "vllm"] = setting(
        "auto", "Engine: hf is transformers; auto is vllm where it is installed and its vectors of the model were compared, else hf.", panel="Model"
    )
    quantization: Quantization = setting("none", "Weight format; hf: nf4, llm.int8; vllm: the others (docs/backends.md).", panel="Model")
    tensor_parallel: int = setting(1, "GPUs that a model's layers are split over, all on one node (vllm).", panel="Model", ge=1)
    engine_arg: list[str] = setting([], "Further argument KEY=VALUE of vLLM's engine, value in YAML; repeatable.", panel="Model")
    token_budget: int | None = setting(None, "Tokens in one forward pass; found while working (hf) or set by device (vllm) if not given.", panel="Model", ge=1)

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        refuse_owned(self.engine_args, OWNED_ENGINE_ARGS)
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
        return parse_engine_args(self.engine_arg)

    def engine(self) -> dict[str, Any]:
        """The settings that a backend may refuse, besides those of the representation."""
        return {"quantization": self.quantization, "tensor_parallel": self.tensor_parallel, "engine_args": self.engine_args}


class ActorSettings(StorageSettings):
    """Actors that hold a model, on a Ray cluster or in this process."""

    actors: str = setting(
        "auto", "Actors that hold a model: N, MIN:MAX, auto (all GPUs, or a few per CPU node), or 0 for this process without Ray.", panel="Cluster"
    )
    gpus_per_actor: float | None = setting(None, "GPUs of an actor; default 1 where the cluster has GPUs, else 0.", panel="Cluster", ge=0)
    cpus_per_actor: float | None = setting(None, "CPU cores of an actor; default: most of a CPU node, at most 8.", panel="Cluster", gt=0)
    ray_address: str | None = setting(None, "Ray cluster; default: RAY_ADDRESS, else a Ray of its own on this machine.", panel="Cluster")

    @field_validator("actors", mode="before")
    @classmethod
    def _number_of_actors(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("actors")
    @classmethod
    def _check_actors(cls, value: str) -> str:
        parse_actors(value)
        return value


class ClusterSettings(ActorSettings, ModelSettings):
    """Embedders in actors."""

    max_attempts: int = setting(3, "Attempts at a unit whose actor dies before it is halved to find the row at fault.", panel="Cluster", ge=1)
    retry_wait: float = setting(
        1.0, "Seconds before a unit whose actor died is tried again; twice as long after each further death, at most 60.", panel="Cluster", ge=0
    )

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.tensor_parallel > 1 and self.gpus_per_actor not in (None, 0, self.tensor_parallel):
            raise ValueError(f"gpus_per_actor: tensor_parallel={self.tensor_parallel} takes as many GPUs for an actor; leave gpus_per_actor out")
        if self.backend == "vllm" and (self.gpus_per_actor or 0) > self.tensor_parallel:
            raise ValueError(f"gpus_per_actor: vLLM would use {self.tensor_parallel} of {self.gpus_per_actor:g} GPUs; set tensor_parallel instead")
        return self


def parse_engine_args(assignments: list[str]) -> dict[str, Any]:
    """A mapping of KEY=VALUE texts, values in YAML. Raises ValueError."""
    arguments = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"engine_arg: {text!r} is not KEY=VALUE with the name of an argument of vLLM's engine, such as max_num_seqs=64")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"engine_arg: the value of {name} is not YAML") from None
    return arguments


def refuse_owned(arguments: dict[str, Any], owned: dict[str, str]) -> None:
    """Raises ValueError for an argument that is settled elsewhere. owned: name -> the setting that does so, "" where none can."""
    for name in arguments.keys() & owned.keys():
        way_out = f"set {owned[name]} instead" if owned[name] else "leave it out"
        raise ValueError(f"engine_arg: {name} is settled by llmemb; {way_out}")


def parse_actors(text: str) -> tuple[int, int] | None:
    """``(least, most)`` of ``N`` or ``MIN:MAX``; None for ``auto``. Raises ValueError."""
    if text == "auto":
        return None
    try:
        low, _, high = text.partition(":")
        least, most = int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{text!r} is none of auto, 0, N, MIN:MAX") from None
    if least < 0 or most < least or (most > 0 and least == 0):
        raise ValueError(f"{text!r} must be 0, N or MIN:MAX with 1 ≤ MIN ≤ MAX")
    return least, most
