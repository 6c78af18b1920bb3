"""What a training left beside an adapter or a model: the representation it learnt, and of which base.

Invariant: an adapter makes vectors in the representation that it was trained with, or none at all; what was not learnt
(the length of prompts and of vectors, cleaning, the instruction of an e5 query) may be chosen. Knows no weights.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmemb_ray.embedders import models
from llmemb_ray.embedders.models import ModelSource
from llmemb_ray.errors import ConfigError, ModelError, NotFound
from llmemb_ray.representation import Representation
from llmemb_ray.representation.representation import FILE_NAME, ROLES, is_e5
from llmemb_ray.representation.space import Context, differences
from llmemb_ray.storage import Access, Storage, redact

if TYPE_CHECKING:
    from llmemb_ray.config import ModelSettings

logger = logging.getLogger(__name__)

FREE = ("max_tokens", "normalize", "dimensions")
"""Fields of a representation that no weight learns, like the cleaning of texts, which paper 1 trains without and evaluates with."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What was found; all of it may be missing.

    adapter:  name of the adapter whose files these are, None where they are the model's
    training: its ``training.json``
    """

    adapter: str | None = None
    representation: Representation | None = None
    training: dict[str, Any] | None = None

    def representation_of(self, settings: ModelSettings) -> Representation:
        """The representation that the settings ask for. Raises ConfigError, with each field, if the adapter was trained with another."""
        made = settings.build_representation(self.representation)
        if self.adapter is None or self.representation is None:
            return made
        allowed = {name: getattr(self.representation, name) for name in FREE}
        e5 = is_e5(made) and is_e5(self.representation)
        forms = {role: self.representation.form(role) if e5 else replace(self.representation.form(role), template=made.form(role).template) for role in ROLES}
        changed = list(differences(self.representation.to_dict(), replace(made, **allowed, **forms).to_dict()))  # type: ignore[arg-type]
        if changed:
            lines = "\n".join(f"  {name}: the adapter has {learnt!r}, asked for is {asked!r}" for name, learnt, asked in changed)
            raise ConfigError(
                f"adapter {self.adapter} was trained with another representation, which its {FILE_NAME} holds:\n{lines}\n"
                "leave these options out, or train an adapter with that representation"
            )
        return made

    def context_of(self, settings: ModelSettings) -> Context:
        """What is to change in the model's configuration: as given, else as the adapter was trained."""
        learnt = (self.training or {}).get("context") or {} if self.adapter is not None else {}
        given = {name: getattr(settings, name) for name in ("rope_theta", "sliding_window")}
        return Context(**{name: learnt.get(name) if value is None else value for name, value in given.items()})

    def check_base(self, model: ModelSource, access: Access) -> None:
        """Raises ConfigError if the adapter was trained on another base than this; only warns where names of two kinds cannot be compared."""
        base = (self.training or {}).get("base") if self.adapter is not None else None
        if not base or not base.get("commit") or base["commit"] == model.commit:
            return
        if model.kind != "hub" and base.get("weights") and models.weights_digest(model, access) == base["weights"]:
            return
        trained, given = f"{base.get('name')} ({base['commit']})", f"{redact(model.name)} ({model.commit})"
        if base["commit"].startswith("sha256:") != model.commit.startswith("sha256:"):
            logger.warning("adapter %s was trained on %s and is put on %s; whether these are the same weights cannot be told", self.adapter, trained, given)
            return
        way_out = f"give model {base.get('name')}" + ("" if base["commit"].startswith("sha256:") else f" with revision {base['commit']}")
        raise ConfigError(f"adapter {self.adapter} was trained on {trained}, not on {given}; {way_out}, or train one for this model")


def read(model: ModelSource, adapter: ModelSource | None, access: Access) -> Beside:
    """The files beside the adapter; the model's where there is no adapter or nothing beside it. Raises ConfigError for a file that is none of ours."""
    for source in (adapter, model):
        if source is None:
            continue
        representation, training = _file(source, FILE_NAME, access), _file(source, models.TRAINING, access)
        if representation is None and training is None:
            continue
        name = redact(source.name)
        return Beside(
            adapter=name if source is adapter else None,
            representation=None if representation is None else Representation.parse(representation, f"{name}/{FILE_NAME}"),
            training=None if training is None else _parsed(training, f"{name}/{models.TRAINING}"),
        )
    return Beside()


def representation_of(settings: ModelSettings) -> Representation:
    """The representation that these settings ask for, with what stands beside adapter and model. Raises ConfigError or ModelError."""
    access = settings.access
    adapter = _source(settings.adapter, None, access, "adapter") if settings.adapter else None
    return read(_source(settings.model, settings.revision, access, "model"), adapter, access).representation_of(settings)


def _source(name: str, revision: str | None, access: Access, what: str) -> ModelSource:
    """Where small files can be read; without the digest of weights."""
    if "://" in name:
        return ModelSource(name=name, kind="url", commit="")
    if os.path.isdir(name) and name != models.POCKET:
        return ModelSource(name=os.path.abspath(name), kind="directory", commit="")
    return models.resolve(name, revision, access, what)


def _file(source: ModelSource, name: str, access: Access) -> bytes | None:
    """Read where it is, not from this node's copy of a URL's files: these do not count in the digest that the copy is named by."""
    place = source.name if source.kind in ("url", "directory") else str(models.fetch(source, access, weights=False))
    try:
        return Storage(place, access).read(name)
    except NotFound:
        return None


def _parsed(text: bytes, origin: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{origin} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{origin} is not a JSON object")
    return found
