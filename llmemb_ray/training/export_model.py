"""Export of a trained model: base and adapter merged into one model, or a directory that sentence-transformers loads.

Invariant: what is written gives the vectors of what it was made of, within the rounding of the dtype written, and carries its
representation. The adapter is added to the base in float32, unquantised; DEST appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmemb_ray import destination
from llmemb_ray.config import ExportModelSettings, ModelSettings
from llmemb_ray.embedders import beside, models
from llmemb_ray.embedders.embedder import EmbedderSpec, settle
from llmemb_ray.errors import ConfigError, ModelError
from llmemb_ray.representation.representation import FILE_NAME, ROLES
from llmemb_ray.representation.space import Context
from llmemb_ray.storage import Storage, absolute, redact
from llmemb_ray.training import card
from llmemb_ray.training.model import copy_tokenizer

PLACES = ("", "adapter", "model")
"""Where in TRAINED an adapter or a model may stand: there, or as finetune leaves them in its OUT."""

MODULE = "llmemb_st"
"""Python file, without its ending, that sentence-transformers imports from the directory."""

MARK = "export.json"
"""Stands in each exported directory: what it was made of, and that it may be replaced."""


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What was written."""

    dest: str
    to: str
    dtype: str
    base: str
    base_commit: str
    adapter: str | None
    trained: str
    """Digest of the vector space of base and adapter."""
    space: str
    """Digest of the vector space of what was written: its weights are other files, hence another space."""
    bytes: int
    how_to_load: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        merged = f" with {self.adapter} merged" if self.adapter else ""
        yield f"{self.base}{merged}, {self.dtype}, {self.bytes / 1e6:,.1f} MB in {self.dest}"
        yield f"to load it: {self.how_to_load}"


def export_model(settings: ExportModelSettings) -> ExportedModel:
    """Writes ``settings.trained`` in the form asked for. Needs memory for the base in float32, four bytes for each parameter.

    Raises ConfigError for a base that is not known, ModelError for weights that do not fit, OutputError for a DEST that is in the way.
    """
    final = destination.free(settings.dest, mark=f".{MARK}", overwrite=settings.overwrite)
    spec = _spec(settings)
    with destination.written(final) as temporary:
        _write_model(spec, settings, temporary)
        _write_tokenizer(spec, temporary)
        spec.representation.save(temporary)
        if settings.to == "sentence-transformers":
            _write_modules(spec, temporary)
            how = f"SentenceTransformer({str(final)!r}, trust_remote_code=True)"
        else:
            how = f"llmemb embed … --model {final}"
        commit = models.resolve(str(temporary)).commit
        made = ExportedModel(
            dest=str(final),
            to=settings.to,
            dtype=settings.dtype,
            base=redact(spec.model.name),
            base_commit=spec.model.commit,
            adapter=redact(spec.adapter.name) if spec.adapter else None,
            trained=spec.space.digest,
            space=_space(spec, commit),
            bytes=sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()),
            how_to_load=how,
        )
        (temporary / card.NAME).write_text(_card(spec, made), encoding="utf-8")
        (temporary / f".{MARK}").write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")
    return made


# -- what is exported ------------------------------------------------------------------------------


def _spec(settings: ExportModelSettings) -> EmbedderSpec:
    """Base, adapter and representation, settled. Raises ConfigError where the base is not known."""
    place, kind = _place(settings)
    values: dict[str, Any] = {"backend": "hf", "compute_dtype": "float32", "trust_remote_code": settings.trust_remote_code}
    values |= {name: getattr(settings, name) for name in ("endpoint_url", "storage_options", "storage_retry_seconds")}
    if kind == "model":
        if settings.base is not None:
            raise ConfigError(f"base: {redact(place)} is a whole model, which needs none; leave base out")
        return settle(ModelSettings.make(values | {"model": place}))
    base, revision = (settings.base, None) if settings.base is not None else _base_of(place, settings)
    try:
        return settle(ModelSettings.make(values | {"model": base, "adapter": place, "revision": revision}))
    except ModelError as error:
        if settings.base is not None:
            raise
        raise ModelError(f"{error} (the base that the adapter {redact(place)} names); give base, the place where it is now") from error


def _place(settings: ExportModelSettings) -> tuple[str, str]:
    """(directory, URL or hub id, "adapter" or "model"). Raises ConfigError."""
    name = settings.trained.rstrip("/")
    if "://" not in name and not os.path.isdir(name):
        if name == models.POCKET:
            return name, "model"
        raise ConfigError(f"trained: {name} is not there; give the OUT of a training, or the directory or URL of an adapter or a model")
    for part in PLACES:
        place = f"{name}/{part}" if part else name
        storage = Storage(place if "://" in place else absolute(place), settings.access)
        for file, kind in (("adapter_config.json", "adapter"), ("config.json", "model")):
            if storage.exists(file):
                return place, kind
    raise ConfigError(f"trained: {redact(name)} holds neither an adapter (adapter_config.json) nor a model (config.json), nor do its adapter/ and model/")


def _base_of(place: str, settings: ExportModelSettings) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision. Raises ConfigError."""
    storage = Storage(place if "://" in place else absolute(place), settings.access)
    if storage.exists(models.TRAINING):
        base = json.loads(storage.read(models.TRAINING)).get("base") or {}
        if base.get("name"):
            return base["name"], base["commit"] if base.get("kind") == "hub" else None
    try:
        config = json.loads(storage.read("adapter_config.json"))
    except ValueError as error:
        raise ModelError(f"adapter {redact(place)}: its adapter_config.json is not JSON: {error}") from error
    name = config.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"base: the adapter {redact(place)} does not name its base; give base")
    return str(name), config.get("revision")


# -- writing ---------------------------------------------------------------------------------------


def _write_model(spec: EmbedderSpec, settings: ExportModelSettings, directory: Path) -> None:
    """The weights and their configuration; with the language-model head for programs that know the model by it, without for sentence-transformers."""
    import torch

    if spec.stored is not None:
        raise ConfigError(
            f"base: {redact(spec.model.name)} is stored as {spec.stored}; an adapter is merged into the base that is not quantised: give that one"
        )
    model = models.load_whole(
        models.fetch(spec.model, spec.access),
        adapter=models.fetch(spec.adapter, spec.access) if spec.adapter else None,
        trust_remote_code=spec.trust_remote_code,
        context=spec.context,
        positions=spec.representation.max_tokens or 0,
        head=settings.to == "merged",
    )
    model.to(getattr(torch, settings.dtype))
    model.config.dtype = getattr(torch, settings.dtype)
    with models.quiet_transformers():
        model.save_pretrained(directory)


def _write_tokenizer(spec: EmbedderSpec, directory: Path) -> None:
    """The base's own files, or what transformers makes of them where there is no tokenizer.json. Raises ModelError unless it reads as the same tokenizer."""
    from transformers import AutoTokenizer

    source = models.fetch(spec.model, spec.access, weights=False)
    if (source / "tokenizer.json").is_file():
        copy_tokenizer(source, directory)
    else:
        AutoTokenizer.from_pretrained(source, trust_remote_code=spec.trust_remote_code).save_pretrained(directory)
    if models.load_tokenizer(directory, trust_remote_code=spec.trust_remote_code).digest != spec.tokenizer.digest:
        raise ModelError(f"model {spec.model.name}: its tokenizer is another one once it is saved; save it with transformers beside the base, and export that")


def _write_modules(spec: EmbedderSpec, directory: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("st_module.py"), directory / f"{MODULE}.py")
    query, document = spec.representation.query, spec.representation.document
    apart = query.clean != document.clean or not all(form.template.endswith("{text}") and "{{" not in form.template for form in (query, document))
    prompts = {} if apart else {role: spec.representation.form(role).template.removesuffix("{text}") for role in ROLES}
    config = {"model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": _similarity(spec)}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULE}.LlmembModel"}]
    (directory / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")


def _similarity(spec: EmbedderSpec) -> str:
    return "cosine" if spec.representation.normalize else "dot"


def _space(spec: EmbedderSpec, commit: str) -> str:
    return replace(spec, model=replace(spec.model, commit=commit), adapter=None, context=Context()).space.digest


def _card(spec: EmbedderSpec, made: ExportedModel) -> str:
    origin = f"{made.base} at `{made.base_commit}`" + (f", with the adapter {made.adapter} merged into its unquantised weights" if made.adapter else "")
    about = f"{origin}; weights in {made.dtype}, vectors of {spec.dimension} dimensions. Exported by `llmemb export-model --to {made.to}`.\n\n"
    about += f"Vector space of what it was made of: `{made.trained}`; of this directory: `{made.space}`. Compare vectors within one space only."
    uses = [card.block("llmemb embed corpus.parquet OUT --model THIS_DIRECTORY")]
    if made.to == "sentence-transformers":
        lines = ["from sentence_transformers import SentenceTransformer", 'model = SentenceTransformer("THIS_DIRECTORY", trust_remote_code=True)']
        lines += ["queries = model.encode_query([…])", "documents = model.encode_document([…])"]
        note = f"`{MODULE}.py` puts texts into the templates of `{FILE_NAME}`, some of whose words follow the text, and pools the states.\n\n"
        uses = [note + card.block(*lines, language="python"), *uses]
    adapted = beside.read(spec.model, spec.adapter, spec.access).training or {}
    base = spec.model.name if spec.model.kind == "hub" else None
    sections = [("What it is", about), ("Use", "\n\n".join(uses)), ("Representation", card.representation_text(spec.representation))]
    sections += [("Data", card.data_text(adapted.get("data") or {})), ("Settings", card.settings_text(adapted["settings"]))] if adapted.get("settings") else []
    library = "sentence-transformers" if made.to == "sentence-transformers" else "transformers"
    title = f"{made.base.rstrip('/').rpartition('/')[2]} for sentence embeddings"
    return card.card(title=title, header=card.header(base=base, library=library), sections=sections)
