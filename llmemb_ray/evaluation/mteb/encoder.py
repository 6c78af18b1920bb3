"""mteb's EncoderProtocol over whatever embeds texts.

Invariant: a text is embedded under the representation of the embedder, but for what paper 2's evaluation does by task:
the task's instruction where prompt e5 has none of the user's, documents of asymmetric tasks without the user's, and no
normalisation for classification. Equal texts of one call are embedded once. Nothing is asked of the hub.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from llmemb_ray.embedders.embedder import Embedder, EmbedderSpec
from llmemb_ray.errors import ConfigError
from llmemb_ray.evaluation import instructions
from llmemb_ray.evaluation.instructions import TaskInstruction
from llmemb_ray.evaluation.suite import Floats
from llmemb_ray.representation import Form, Representation, Role, templates

UNNORMALISED_TYPES = frozenset({"Classification"})
"""Task types whose vectors keep their length: paper 2's code turns normalisation off for them ("slightly better")."""


class Embeds(Protocol):
    """What an encoder is made over: a ``Pool``, or an ``Embedder`` through ``Encoder.of``."""

    @property
    def spec(self) -> EmbedderSpec: ...

    def encode(self, texts: Sequence[str], *, role: Role = "document", representation: Representation | None = None) -> Floats:
        """float32 [N, D]. representation: in place of the embedder's own; differs from it in templates and normalisation alone."""


def library() -> Any:
    """The package mteb. Raises ConfigError where it is not installed."""
    try:
        import mteb
    except ImportError as error:
        raise ConfigError(f"suite: mteb needs the package mteb ({error}); pip install 'llmemb-ray[mteb]'") from error
    return mteb


class Encoder:
    """An embedder as mteb wants a model.

    >>> mteb.evaluate(Encoder.of(Embedder.load("facebook/opt-125m")), mteb.get_task("STS12"))  # doctest: +SKIP
    """

    def __init__(
        self, embeds: Embeds, *, name: str | None = None, task_instructions: bool | None = None, plain_documents: bool | None = None, role: Role = "document"
    ) -> None:
        """name: of the model in mteb's results, ORGANISATION/MODEL; default: from the spec.
        task_instructions: put each task's instruction before its texts; default: if the representation is that of prompt e5 without one.
        plain_documents: leave the instruction out before documents of asymmetric tasks (paper 2: queries alone have one); default: if the
        representation is that of prompt e5 with an instruction on both sides.
        role: of texts that a task calls neither query nor document.
        """
        self._embeds, self._role = embeds, role
        self._spec = spec = embeds.spec
        self.task_instructions = is_bare_e5(spec.representation) if task_instructions is None else task_instructions
        self.plain_documents = is_instructed_e5(spec.representation) if plain_documents is None else plain_documents
        self.rejected = 0
        """Documents so far that the embedding job rejected; they are no result of any query."""
        self.blank = 0
        """Texts so far without a character but white space; their vector is zero, as there is nothing to embed."""
        changed = {"task_instructions": self.task_instructions, "plain_documents": self.plain_documents}
        self.mteb_model_meta = model_meta(spec, name=name or model_name(spec), **changed)

    @classmethod
    def of(cls, embedder: Embedder, **options: Any) -> Encoder:
        """Over one loaded embedder, in a notebook. options: of the constructor."""
        return cls(_Loaded(embedder), **options)

    def encode(
        self, inputs: Iterable[Mapping[str, Any]], *, task_metadata: Any, hf_split: str = "", hf_subset: str = "", prompt_type: Any = None, **_: Any
    ) -> Floats:
        """float32 [N, D], a row a text. Raises InputError naming the first text that cannot be embedded, other than a blank one.

        inputs: mteb's batches, of which ``text`` is embedded: mteb has put a document's title before it and a query's own instruction after it.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        distinct = {text: place for place, text in enumerate(dict.fromkeys(text for text in texts if text.strip()))}
        role: Role = self._role if prompt_type is None else "query" if prompt_type == "query" else "document"
        vectors = np.zeros((len(texts), self._spec.dimension), np.float32)
        filled = [row for row, text in enumerate(texts) if text in distinct]
        self.blank += len(texts) - len(filled)
        if distinct:
            made = self._embeds.encode(list(distinct), role=role, representation=self.representation(task_metadata, prompt_type))
            vectors[filled] = made[[distinct[texts[row]] for row in filled]]
        return vectors

    def representation(self, task_metadata: Any, prompt_type: Any = None) -> Representation:
        """Under which a task's texts are embedded."""
        representation = self._spec.representation
        if task_metadata.type in UNNORMALISED_TYPES:
            representation = replace(representation, normalize=False)
        if self.plain_documents and prompt_type == "document" and not is_symmetric(task_metadata):
            return replace(representation, document=replace(representation.document, template=templates.NONE))
        found = task_instruction(task_metadata, prompt_type) if self.task_instructions else None
        if found is None:
            return representation
        query = Form(template=templates.e5_query(found.text), clean=representation.query.clean)
        # A text of a task without sides is embedded in the encoder's own role.
        either = found.symmetric or prompt_type is None
        document = Form(template=templates.e5_query(found.text), clean=representation.document.clean) if either else representation.document
        return replace(representation, query=query, document=document)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """float32 [N, M]: cosines."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """float32 [N]: cosines of the rows of one with those of the other."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def is_bare_e5(representation: Representation) -> bool:
    """Whether this is prompt e5 without an instruction: plain texts that end with EOS."""
    return representation.append_eos and representation.query.template == representation.document.template == templates.NONE


def is_instructed_e5(representation: Representation) -> bool:
    """Whether this is prompt e5 with an instruction that documents have as well."""
    before, after = templates.E5_QUERY.split("{instruction}")
    template = representation.document.template
    return template == representation.query.template and template.startswith(before) and template.endswith(after)


def is_symmetric(task_metadata: Any) -> bool:
    """Whether both sides of one of mteb's tasks have its instruction."""
    found = instructions.find(task_metadata.name, task_metadata.type)
    return found.symmetric if found is not None else instructions.symmetric(task_metadata.type)


def task_instruction(task_metadata: Any, prompt_type: Any = None) -> TaskInstruction | None:
    """Paper 2's instruction of one of mteb's tasks; for a task that it does not name, the one that mteb has."""
    found = instructions.find(task_metadata.name, task_metadata.type)
    if found is not None or not task_metadata.prompt:
        return found
    prompt = task_metadata.prompt
    if isinstance(prompt, Mapping):
        text = prompt.get("document" if prompt_type == "document" else "query")
        return TaskInstruction(text=text, symmetric=True) if text else None
    return TaskInstruction(text=prompt, symmetric=instructions.symmetric(task_metadata.type))


def model_name(spec: EmbedderSpec) -> str:
    """Of mteb's form ORGANISATION/MODEL: a hub id as it is, else llmemb/ and the last part of the name."""
    name = spec.model.name.rstrip("/")
    return name if spec.model.kind == "hub" and "/" in name else f"llmemb/{posixpath.basename(name)}"


def revision(spec: EmbedderSpec, *, task_instructions: bool, plain_documents: bool) -> str:
    """Commit and space, cut to 12 digits each, and what else decides a result: mteb takes results of the same revision for the same."""
    parts = [spec.model.commit.removeprefix("sha256:")[:12], spec.space.digest[:12], spec.compute_dtype]
    parts += [spec.quantization] if spec.quantization != "none" else []
    return "-".join(parts + ["instructed"] * task_instructions + ["plain-documents"] * plain_documents)


def model_meta(spec: EmbedderSpec, *, name: str, task_instructions: bool, plain_documents: bool) -> Any:
    """mteb's ModelMeta; what nobody has told it stands as unknown."""
    meta = library().models.ModelMeta
    unknown = dict.fromkeys(("release_date", "languages", "n_parameters", "memory_usage_mb", "license", "open_weights"))
    training = dict.fromkeys(("public_training_code", "public_training_data", "training_datasets"))
    return meta(
        loader=None,
        name=name,
        revision=revision(spec, task_instructions=task_instructions, plain_documents=plain_documents),
        max_tokens=spec.representation.max_tokens,
        embed_dim=spec.dimension,
        framework=["PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=task_instructions or "Instruct:" in spec.representation.query.template,
        **unknown,
        **training,
    )


@dataclass(frozen=True)
class _Loaded:
    embedder: Embedder

    @property
    def spec(self) -> EmbedderSpec:
        return self.embedder.spec

    def encode(self, texts: Sequence[str], *, role: Role = "document", representation: Representation | None = None) -> Floats:
        embedder = self.embedder if representation is None else self.embedder.under(representation)
        return embedder.encode(list(texts), role)
