"""An embedder: one loaded model with its representation. Texts or token sequences in, vectors out.

It knows nothing of Ray or of files; it runs in a notebook as in an actor.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from llmemb_ray import engines
from llmemb_ray.embedders import beside, capabilities, models
from llmemb_ray.embedders.models import ModelSource, TokenizerSource
from llmemb_ray.embedders.work import Pooled, Work
from llmemb_ray.errors import ConfigError, InputError
from llmemb_ray.representation import Prompter, Representation, Role, Space, TokenRows
from llmemb_ray.representation.representation import ROLES
from llmemb_ray.representation.space import Context
from llmemb_ray.storage import Access

if TYPE_CHECKING:
    from llmemb_ray.config import ModelSettings


class Backend(Protocol):
    """What an embedder needs of an engine with a loaded model."""

    name: str

    @property
    def token_budget(self) -> int:
        """Tokens in one forward pass."""

    def embed(self, rows: TokenRows, prefix: npt.NDArray[np.int32] | None = None, *, on_pack: Callable[[int, int], None] | None = None) -> Pooled:
        """Pools every row. ``prefix`` are tokens that many rows begin with; on_pack is called with (rows, tokens) of each forward pass."""

    def forget(self) -> None:
        """Drops what is kept of earlier rows and prefixes, so that the next rows are computed anew."""


@dataclass(frozen=True, kw_only=True)
class EmbedderSpec:
    """Everything that a process needs to load the same embedder as any other. Plain data; holds no weights."""

    model: ModelSource
    adapter: ModelSource | None
    tokenizer: TokenizerSource = field(repr=False)
    representation: Representation
    """With ``max_tokens`` settled."""
    dimension: int
    """D of the vectors put out."""
    context: Context = field(default_factory=Context)
    """What is changed in the model's configuration, settled."""
    backend: Literal["auto", "hf", "vllm"] = "hf"
    backend_why: str = field(default="", compare=False)
    """How ``backend`` was chosen."""
    compute_dtype: models.ComputeDtype = "auto"
    quantization: engines.Quantization = "none"
    stored: str | None = None
    """Format in which the checkpoint itself is quantised."""
    tensor_parallel: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine."""
    gpu_share: float = 1.0
    """Of each of its GPUs this embedder may take so much."""
    gpu: bool = False
    """Whether it will run on GPUs, once ``on`` has settled it."""
    token_budget: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    access: Access = field(default_factory=Access, repr=False)
    model_flops: float = 0.0
    """Floating-point operations for one token, roughly: twice the parameters of the layers."""
    parameters: int = 0
    """Weights of the layers and of the token embedding, from the configuration; norms, biases and positions left out."""
    model_type: str = ""
    head_size: int = 0
    """Dimensions of an attention head."""
    vocabulary: int | None = None
    """Token ids that the model knows; None where its configuration does not say."""
    heads: int = 0
    """Attention heads."""
    rope_switch: int | None = None
    """Length above which LongRoPE turns rows by other angles."""
    lora_problem: str | None = None
    """Why vLLM cannot serve the adapter."""

    def on(self, gpu: bool) -> EmbedderSpec:
        """The spec with backend and compute dtype settled for where it will run."""
        choice = engines.Choice(self.backend, self.backend_why) if self.backend != "auto" else engines.choose(gpu=gpu, model=self.facts(), **self._settings())
        dtype = models.resolve_dtype(self.compute_dtype, "cuda" if gpu else "cpu")
        format_ = engines.WEIGHT_FORMATS.get(self.quantization)
        if self.compute_dtype == "auto" and format_ is not None and format_.backend == "vllm":
            dtype = "bfloat16"  # vLLM computes with none of its formats in float32.
        return replace(self, backend=choice.backend, backend_why=choice.why, compute_dtype=dtype, gpu=gpu)

    def refuse(self) -> None:
        """Raises ConfigError with all that the backend, once it is known, cannot do."""
        if self.backend == "auto":
            return
        refused = engines.refusals(self.backend, **self._settings())
        if self.backend == "vllm":
            refused += engines.cannot_serve(self.facts(), **self._settings())
        if refused:
            raise ConfigError("; ".join(refused))

    def facts(self) -> engines.ModelFacts:
        """What decides whether vLLM can run the model."""
        return engines.ModelFacts(
            model_type=self.model_type,
            head_size=self.head_size,
            heads=self.heads,
            stored=self.stored,
            lora_problem=self.lora_problem,
            beyond_rope_switch=self.rope_switch is not None and (self.representation.max_tokens or 0) > self.rope_switch,
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "pooling": self.representation.pooling,
            "layer": self.representation.layer,
            "quantization": self.quantization,
            "tensor_parallel": self.tensor_parallel,
            "engine_args": self.engine_args,
        }

    @property
    def space(self) -> Space:
        return Space(
            representation=self.representation,
            model=self.model.commit,
            adapter=self.adapter.commit if self.adapter else None,
            tokenizer=self.tokenizer.digest,
            context=self.context,
        )

    def prompter(self, role: Role) -> Prompter:
        return Prompter(self.representation, role, tokenizer_json=self.tokenizer.json, eos_id=self.tokenizer.eos_id)


def settle(settings: ModelSettings, representation: Representation | None = None) -> EmbedderSpec:
    """Resolves revisions, reads configuration and tokenizer, and checks the representation against them.

    representation: used as it is, in place of the one that the settings describe or that stands beside the adapter or model.
    Loads no weights. Raises ConfigError or ModelError.
    """
    from llmemb_ray.embedders.transformers_backend import check_layer, output_size

    source = models.resolve(settings.model, settings.revision, settings.access)
    adapter = models.resolve(settings.adapter, None, settings.access, "adapter") if settings.adapter else None
    found = beside.read(source, adapter, settings.access)
    representation = representation or found.representation_of(settings)
    asked = found.context_of(settings)
    found.check_base(source, settings.access)
    path = models.fetch(source, settings.access, weights=False)
    config = models.load_config(path, trust_remote_code=settings.trust_remote_code)
    tokenizer = models.load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    context = models.settle_context(asked, config)
    representation = models.settle_max_tokens(representation, config, extended=asked.rope_theta is not None)
    check_layer(representation.layer, int(config.num_hidden_layers))
    written = models.read_config_file(path)
    stored = models.settle_quantization(settings.quantization, written)
    lora = models.lora_of(models.fetch(adapter, settings.access, weights=False)) if adapter else None
    dimension = models.settle_dimension(representation, output_size(config, representation.layer))
    spec = EmbedderSpec(
        model=source,
        adapter=adapter,
        tokenizer=tokenizer,
        representation=representation,
        dimension=dimension,
        context=context,
        backend=settings.backend,
        backend_why="" if settings.backend == "auto" else "as you asked",
        stored=stored,
        tensor_parallel=settings.tensor_parallel,
        engine_args=settings.engine_args,
        compute_dtype=settings.compute_dtype,
        quantization=settings.quantization,
        token_budget=settings.token_budget,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
        access=settings.access,
        model_flops=models.flops_per_token(config),
        parameters=models.parameters(config),
        model_type=str(written.get("model_type", "")),
        heads=int(getattr(config, "num_attention_heads", 0) or 0),
        rope_switch=capabilities.rope_switch(config),
        head_size=models.head_size(config) if hasattr(config, "num_attention_heads") else 0,
        vocabulary=getattr(config, "vocab_size", None),
        lora_problem=lora.problem if lora else None,
    )
    spread = getattr(settings, "gpus_per_actor", None) or 0
    if spec.backend == "auto" and spread > max(1, spec.tensor_parallel):
        spec = replace(spec, backend="hf", backend_why=f"gpus_per_actor={spread:g} spreads whole layers over GPUs")
    spec.refuse()
    spec.prompter(settings.role)  # refuses a template that leaves no room for text
    return spec


@dataclass
class Embedded:
    """Vectors of one call.

    vectors: float32 [N, D], zero where the row failed
    failed:  row number -> why it has no vector
    """

    vectors: npt.NDArray[np.float32]
    failed: dict[int, str]
    work: Work


class Embedder:
    """A loaded model with its representation.

    >>> embedder = Embedder.load("facebook/opt-125m")      # doctest: +SKIP
    >>> embedder.encode(["A man plays a guitar."]).shape   # doctest: +SKIP
    (1, 768)
    """

    def __init__(self, spec: EmbedderSpec, *, device: str | None = None, plain: bool = False) -> None:
        """plain: transformers without packing or a shared prefix, as the papers' own code runs a model; what vectors are compared with."""
        if device is not None and spec.backend == "auto":
            spec = replace(spec, backend="hf", backend_why="a device was named")
        spec = spec.on(gpu=(device or models.default_device()).startswith("cuda"))
        if device is not None and spec.backend == "vllm":
            raise ConfigError("device: vLLM takes the device it was built for; leave device out, or set backend hf")
        self.spec, self.representation = spec, spec.representation
        self._prompters: dict[Role, Prompter] = {}
        self._lock = threading.Lock()
        assert not (plain and spec.backend == "vllm"), "plain inference is transformers'"
        self.backend: Backend = self._vllm() if spec.backend == "vllm" else self._transformers(device, packed=False if plain else None)

    def _vllm(self) -> Backend:
        from llmemb_ray.embedders.vllm_backend import VllmBackend

        prefixes = []
        for role in ROLES:
            with contextlib.suppress(ConfigError):  # A role whose template leaves no room says so when it is used.
                prefixes.append(self.prompter(role).shared_prefix)
        return VllmBackend(self.spec, prefixes=prefixes)

    def _transformers(self, device: str | None, *, packed: bool | None) -> Backend:
        from llmemb_ray.embedders.transformers_backend import TransformersBackend

        spec = self.spec
        model = models.load_model(
            models.fetch(spec.model, spec.access, pickled=spec.allow_pickle),
            compute_dtype=spec.compute_dtype,
            quantization=spec.quantization,
            device=device,
            adapter=models.fetch(spec.adapter, spec.access) if spec.adapter else None,
            trust_remote_code=spec.trust_remote_code,
            allow_pickle=spec.allow_pickle,
            context=spec.context,
        )
        representation = self.representation
        return TransformersBackend(model, pooling=representation.pooling, layer=representation.layer, token_budget=spec.token_budget, packed=packed)

    @classmethod
    def load(cls, model: str, *, device: str | None = None, **settings: Any) -> Embedder:
        """Loads ``model`` with the settings of ``ModelSettings`` (prompt, pooling, max_tokens, adapter …).

        device: a torch device, default: the GPUs this process sees, else the CPU. Raises ConfigError or ModelError.
        """
        from llmemb_ray.config import ModelSettings

        return cls(settle(ModelSettings.make({"model": model, **settings})), device=device)

    def under(self, representation: Representation) -> Embedder:
        """The same loaded model with other templates, cleaning, EOS or normalisation; calls on both take turns.

        representation: ``max_tokens=None`` keeps this one's. Raises ConfigError if it differs in what the model was loaded for.
        """
        if representation.max_tokens is None:
            representation = replace(representation, max_tokens=self.representation.max_tokens)
        for name in ("pooling", "layer", "dimensions"):
            ours, theirs = getattr(self.representation, name), getattr(representation, name)
            if ours != theirs:
                raise ConfigError(f"{name}: the model is loaded for {ours!r}, a representation with {theirs!r} needs one of its own")
        ours_most, theirs_most = self.representation.max_tokens, representation.max_tokens
        if ours_most is not None and theirs_most is not None and theirs_most > ours_most:
            raise ConfigError(f"max_tokens: the model is loaded for prompts of {ours_most} tokens, a representation with {theirs_most} needs one of its own")
        other = copy.copy(self)
        other.spec, other.representation = replace(self.spec, representation=representation), representation
        other._prompters = {}
        return other

    @property
    def dimension(self) -> int:
        return self.spec.dimension

    def prompter(self, role: Role) -> Prompter:
        if role not in self._prompters:
            self._prompters[role] = self.spec.prompter(role)
        return self._prompters[role]

    def encode(self, texts: list[str], role: Role = "document") -> npt.NDArray[np.float32]:
        """float32 [N, D]: one vector a text, in order. Raises InputError naming the first text that cannot be embedded."""
        embedded = self.encode_rows(texts, role)
        for index, reason in sorted(embedded.failed.items()):
            raise InputError(f"text {index}: {reason}")
        return embedded.vectors

    def encode_rows(self, texts: list[str], role: Role = "document") -> Embedded:
        """Like ``encode``, but a text that cannot be embedded gets a zero vector and stands in ``failed``."""
        rows, unfit = self.prompter(role).tokenize(texts)
        embedded = self.embed_tokens(rows, role)
        embedded.failed.update({index: problem.detail for index, problem in enumerate(unfit) if problem is not None})
        return embedded

    def embed_tokens(
        self,
        rows: TokenRows,
        role: Role = "document",
        *,
        on_pack: Callable[[int, int], None] | None = None,
        turn: contextlib.AbstractContextManager[None] | None = None,
        share: bool = True,
    ) -> Embedded:
        """Vectors of token sequences that ``prompter(role)`` made. Calls from several threads take turns.

        on_pack: called with (rows, tokens) of each forward pass that was started; turn: entered while these rows, and no others,
        are computed; share: compute the tokens that prompts begin with once (False, to measure what that saves). Raises EngineDied.
        """
        from llmemb_ray.representation.vectors import finish

        prefix = self.prompter(role).shared_prefix if share else np.zeros(0, np.int32)
        unknown = self._unknown_tokens(rows)
        fit = rows.take([row if row not in unknown else None for row in range(len(rows))]) if unknown else rows
        with self._lock, turn or contextlib.nullcontext():
            started = time.perf_counter()
            pooled = self.backend.embed(fit, prefix, on_pack=on_pack)
            vectors = finish(pooled.vectors, self.representation).cpu().numpy()
            pooled.work.seconds = time.perf_counter() - started
        pooled.work.shareable = int(fit.shared(prefix).sum())
        return Embedded(vectors, pooled.failed | unknown, pooled.work)

    def forget(self) -> None:
        """Drops what the backend keeps of earlier rows and prefixes: the next rows are computed anew."""
        with self._lock:
            self.backend.forget()

    def _unknown_tokens(self, rows: TokenRows) -> dict[int, str]:
        """Rows with a token that the model has no embedding for, which a tokenizer with more tokens than the model can make."""
        size = self.spec.vocabulary
        if size is None or not len(rows.ids) or int(rows.ids.max()) < size:
            return {}
        places = np.flatnonzero(rows.ids >= size)
        owners = np.searchsorted(rows.offsets, places, side="right") - 1
        last_first = list(zip(owners.tolist(), places.tolist(), strict=True))[::-1]
        return {row: f"token {int(rows.ids[place])} is not among the model's {size}" for row, place in last_first}
