"""An embedder: one loaded model with its representation. Texts or token sequences in, vectors out.

It knows nothing of Ray or of files; it runs in a notebook as in an actor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmemb_ray.embedders import models
from llmemb_ray.embedders.models import ModelSource, TokenizerSource
from llmemb_ray.embedders.work import Work
from llmemb_ray.errors import InputError
from llmemb_ray.representation import Prompter, Representation, Role, Space, TokenRows
from llmemb_ray.storage import Access

if TYPE_CHECKING:
    from llmemb_ray.config import ModelSettings


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
    backend: str = "hf"
    compute_dtype: models.ComputeDtype = "auto"
    quantization: models.Quantization = "none"
    token_budget: int | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    access: Access = field(default_factory=Access, repr=False)
    model_flops: float = 0.0
    """Floating-point operations for one token, roughly: twice the parameters of the layers."""

    @property
    def space(self) -> Space:
        return Space(
            representation=self.representation,
            model=self.model.commit,
            adapter=self.adapter.commit if self.adapter else None,
            tokenizer=self.tokenizer.digest,
        )

    def prompter(self, role: Role) -> Prompter:
        return Prompter(self.representation, role, tokenizer_json=self.tokenizer.json, eos_id=self.tokenizer.eos_id)


def settle(settings: ModelSettings, representation: Representation | None = None) -> EmbedderSpec:
    """Resolves revisions, reads configuration and tokenizer, and checks the representation against them.

    representation: used as it is, in place of the one that the settings describe.
    Loads no weights. Raises ConfigError or ModelError.
    """
    from llmemb_ray.embedders.transformers_backend import check_layer, output_size

    representation = representation or settings.build_representation()
    source = models.resolve(settings.model, settings.revision, settings.access)
    adapter = models.resolve(settings.adapter, None, settings.access, "adapter") if settings.adapter else None
    path = models.fetch(source, settings.access, weights=False)
    config = models.load_config(path, trust_remote_code=settings.trust_remote_code)
    tokenizer = models.load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    representation = models.settle_max_tokens(representation, config)
    check_layer(representation.layer, int(config.num_hidden_layers))
    dimension = models.settle_dimension(representation, output_size(config, representation.layer))
    spec = EmbedderSpec(
        model=source,
        adapter=adapter,
        tokenizer=tokenizer,
        representation=representation,
        dimension=dimension,
        compute_dtype=settings.compute_dtype,
        quantization=settings.quantization,
        token_budget=settings.token_budget,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
        access=settings.access,
        model_flops=models.flops_per_token(config),
    )
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

    def __init__(self, spec: EmbedderSpec, *, device: str | None = None) -> None:
        from llmemb_ray.embedders.transformers_backend import TransformersBackend

        self.spec, self.representation = spec, spec.representation
        model = models.load_model(
            models.fetch(spec.model, spec.access, pickled=spec.allow_pickle),
            compute_dtype=spec.compute_dtype,
            quantization=spec.quantization,
            device=device,
            adapter=models.fetch(spec.adapter, spec.access) if spec.adapter else None,
            trust_remote_code=spec.trust_remote_code,
            allow_pickle=spec.allow_pickle,
        )
        self.backend = TransformersBackend(model, pooling=self.representation.pooling, layer=self.representation.layer, token_budget=spec.token_budget)
        self._prompters: dict[Role, Prompter] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(cls, model: str, *, device: str | None = None, **settings: Any) -> Embedder:
        """Loads ``model`` with the settings of ``ModelSettings`` (prompt, pooling, max_tokens, adapter …).

        device: a torch device, default: the GPUs this process sees, else the CPU. Raises ConfigError or ModelError.
        """
        from llmemb_ray.config import ModelSettings

        return cls(settle(ModelSettings.make({"model": model, **settings})), device=device)

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

    def embed_tokens(self, rows: TokenRows, role: Role = "document", *, on_pack: Callable[[int, int], None] | None = None) -> Embedded:
        """Vectors of token sequences that ``prompter(role)`` made. Calls from several threads take turns.

        on_pack: called with (rows, tokens) of each forward pass that was started.
        """
        from llmemb_ray.representation.vectors import finish

        with self._lock:
            pooled = self.backend.embed(rows, self.prompter(role).shared_prefix, on_pack=on_pack)
            vectors = finish(pooled.vectors, self.representation).cpu().numpy()
        return Embedded(vectors, pooled.failed, pooled.work)
