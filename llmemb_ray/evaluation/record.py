"""What an evaluation found: kept as ``evaluation.json`` in its directory, read by comparisons and pages.

Invariant: figures are × 100 and unrounded; a figure stands once. A record that was read is one that this version understands.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from llmemb_ray.errors import InputError, NotFound, OutputError
from llmemb_ray.representation import templates
from llmemb_ray.representation.representation import Representation
from llmemb_ray.storage import Access, Storage, absolute

PATH = "evaluation.json"
FORMAT = 1


PROTOCOL = {
    "transfer": ("seed", "classifier", "folds"),
    "retrieval": ("split", "top_k", "task_instructions"),
    "passkey": ("seed",),
    "sts": ("task_instructions",),
    "sts-raw": ("task_instructions",),
    "bitext": ("task_instructions",),
    "mteb": ("task_instructions",),
}
"""Settings that decide a suite's figures besides the representation: tasks evaluated under others make no average together."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model under one representation on some suites."""

    model: str
    """As it was named."""
    commit: str
    adapter: str | None
    parameters: int
    """Of the model, from its configuration: layers and token embedding, biases and norms left out."""
    method: str
    """``method`` of the representation."""
    representation: dict[str, Any]
    space: str
    """Digest."""
    context: dict[str, Any] = field(default_factory=dict)
    """What was changed of the model's positions: rope_theta, sliding_window."""
    dimension: int
    engine: dict[str, Any]
    """backend, compute_dtype, quantization"""
    suites: dict[str, dict[str, float]]
    """Suite → task → figure × 100, and 'avg'."""
    details: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Suite → task → further figures (``Score.parts``)."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of the last command: texts wanted, texts embedded (each once), tokens; documents of retrieval corpora included."""
    seconds: dict[str, float] = field(default_factory=dict)
    """embed, of the last command, and each suite's scoring"""
    protocol: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Suite → its own settings (``PROTOCOL``) and its engine (backend, compute_dtype, quantization)."""
    contamination: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    out: str = ""
    """Where it was written."""
    command: str = ""
    finished: float = 0.0
    """Unix time."""
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, output: Storage) -> None:
        output.put(PATH, json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode())


def method(representation: Representation, prompt: str | None) -> str:
    """The method by the name of its prompt: prompteol, prompteol-icl, e5, none (the bare text), or template.

    prompt: the setting, None where a file described the representation: an E5 without instructions is else a bare text with an EOS.
    """
    template = representation.document.template
    if template.endswith(templates.PROMPTEOL):
        return "prompteol" if template == templates.PROMPTEOL else "prompteol-icl"
    instructed = any(form.template.startswith("Instruct: ") for form in (representation.document, representation.query))
    if representation.append_eos and (prompt == "e5" or instructed):
        return "e5"
    return "none" if template == templates.NONE else "template"


def load(url: str, access: Access | None = None) -> Evaluation:
    """The evaluation in a directory. Raises InputError if there is none, OutputError if it is not understood."""
    storage = Storage(absolute(url), access or Access())
    try:
        data = json.loads(storage.read(PATH))
    except NotFound as error:
        raise InputError(f"{url} holds no evaluation (there is no {PATH} in it); name a directory that llmemb evaluate wrote with --out") from error
    except ValueError as error:
        raise OutputError(f"{storage.display(PATH)} is not JSON: {error}") from error
    known = Evaluation.__dataclass_fields__
    if not isinstance(data, dict) or data.get("format", 0) > FORMAT or not {"model", "suites", "representation"} <= data.keys():
        raise OutputError(f"{storage.display(PATH)} is no evaluation that this version of llmemb_ray understands")
    try:
        return Evaluation(**{name: value for name, value in data.items() if name in known})
    except TypeError as error:
        raise OutputError(f"{storage.display(PATH)}: {error}") from error
