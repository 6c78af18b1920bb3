"""What papers published of these suites: data with their sources, and which row stands beside an evaluation.

Invariant: a figure is shown as approximate ('≈') where it was recalled or read off a figure. Nothing here is computed from
another row; what no paper printed is absent, and so is a row that ours is not comparable with (another split, other texts).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml

from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.representation import templates

FAMILIES = {"opt": r"(?<![a-z])opt(?![a-z])", "llama": "llama", "mistral": "mistral"}
"""Told by a model's name, in lower case."""

METHODS = {
    "prompteol": "PromptEOL, zero-shot",
    "prompteol-icl": "PromptEOL, in-context",
    "fine-tuned": "fine-tuned",
    "e5": "E5",
    "prompt": "prompt without 'in one word'",
    "avg": "mean of the states",
    "last": "last token",
    "echo": "echo",
    "mask": "prompt with a mask",
    "encoder": "encoder",
    "template": "own template",
}
"""In words."""

PROMPT = 'This sentence : "{text}" means'
"""The 'prompt' method of paper 1, section 3.1."""

_NEXT = {"last": ("avg",), "template": ("prompt",), "prompt": ("mask",), "e5": ("fine-tuned",), "fine-tuned": ("e5",)}
"""Methods to look at where a suite has none of the evaluation's own, before zero-shot PromptEOL and E5."""

SAME_TASKS = {"sts-raw": "sts"}
"""Suites whose published figures stand under another name."""

AVERAGED = {
    "sts": ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R"),
    "transfer": ("MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC"),
}
"""Tasks that a published average is of; that of fewer is no counterpart."""

LANGUAGES = 112
"""Languages that a published average of bitext is of."""

SPLIT = "test"
"""Of the judgements that published figures of retrieval are on."""

_INSTRUCTED = re.compile(r"Instruct: .*\nQuery: \{text\}", re.DOTALL)
"""The e5 template with an instruction."""

_WORDS = {"sliding_window": "window", "rope_theta": "base", "quantization": "weights"}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of a paper's table. tasks: figures × 100 by our names; avg: None where none was printed."""

    suite: str
    model: str
    family: str
    parameters: float
    method: str
    tasks: dict[str, float]
    avg: float | None
    source: str
    approximate: Literal["none", "tasks", "all"] = "none"
    data: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def figure(self, task: str) -> float | None:
        """Of a task, or of 'avg'."""
        return self.avg if task == "avg" else self.tasks.get(task)

    def is_approximate(self, task: str) -> bool:
        return self.approximate == "all" or (self.approximate == "tasks" and task != "avg")

    @property
    def title(self) -> str:
        """Model, method and whatever else tells the row from its neighbours, in words."""
        data = f" on {self.data}" if self.data and self.method == "fine-tuned" else f", trained on {self.data}" if self.data else ""
        settings = "".join(f", {_WORDS[name]} {_short(value)}" for name, value in self.settings.items())
        return f"{self.model}, {METHODS[self.method]}{data}{settings}"


def shown(figure: float | None, *, approximate: bool = False, digits: int = 2) -> str:
    """As a table shows it: '–' for none."""
    return "–" if figure is None else f"{'≈' if approximate else ''}{figure:.{digits}f}"


@cache
def rows() -> tuple[Published, ...]:
    """All rows, in the order of the file."""
    groups = yaml.safe_load((resources.files("llmemb_ray.evaluation") / "published.yaml").read_text(encoding="utf-8"))
    return tuple(_row(group, values) for group in groups for values in group["rows"])


def _row(group: dict[str, Any], values: list[Any]) -> Published:
    given = dict(group["defaults"]) | {name: value for name, value in zip(group["columns"], values, strict=True) if value != "-"}
    known = {name: given.pop(name) for name in ("suite", "model", "method", "parameters", "avg", "source", "approximate", "data", "settings") if name in given}
    own = given.pop("family", None) or family(known["model"])
    return Published(family=own, tasks={str(task): float(figure) for task, figure in given.items()}, **({"avg": None} | known))


def of(suite: str, method: str | None = None) -> list[Published]:
    """Rows of a suite, and of one method if it is named."""
    suite = SAME_TASKS.get(suite, suite)
    return [row for row in rows() if row.suite == suite and method in (None, row.method)]


def family(model: str) -> str:
    """opt, llama or mistral, where the model's name tells it, else empty."""
    last_name = model.lower().rstrip("/").rpartition("/")[2]
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, last_name)), "")


def method_of(evaluation: Evaluation) -> str:
    """The method as the papers tell them apart, a key of ``METHODS``."""
    if _is_e5(evaluation):
        return "e5"
    if evaluation.adapter:
        return "fine-tuned"
    template = evaluation.representation.get("document", {}).get("template", "")
    if template == templates.NONE:
        return "last" if evaluation.representation.get("pooling", "last") == "last" else "avg"
    if template.strip() == PROMPT:
        return "prompt"
    return evaluation.method if evaluation.method in ("prompteol", "prompteol-icl") else "template"


def _is_e5(evaluation: Evaluation) -> bool:
    """Whether prompts end with EOS and have paper 2's form: the setting says so, or a template with an instruction. A bare text with EOS is none."""
    made = evaluation.representation
    instructed = any(_INSTRUCTED.fullmatch(made.get(role, {}).get("template", "")) for role in ("document", "query"))
    return bool(made.get("append_eos")) and (evaluation.settings.get("prompt") == "e5" or instructed)


def is_whole(evaluation: Evaluation, suite: str) -> bool:
    """Whether the evaluation's average of a suite is of all the tasks that published averages are of."""
    tasks = evaluation.suites.get(suite, {}).keys() - {"avg"}
    return len(tasks) >= LANGUAGES if suite == "bitext" else tasks.issuperset(AVERAGED.get(SAME_TASKS.get(suite, suite), ()))


def incomparable(evaluation: Evaluation, suite: str) -> dict[str, str]:
    """Columns that no published figure stands beside, and why: another split, data of another form, the average of other tasks."""
    found = {}
    for task, parts in evaluation.details.get(suite, {}).items():
        split, note = parts.get("split", SPLIT), parts.get("note")
        if split != SPLIT:
            found[task] = f"scored on the split {split!r}" + (f"; {note}" if note else "")
        elif note:
            found[task] = str(note)
    return found | ({} if is_whole(evaluation, suite) else {"avg": "of other tasks than the published one"})


def nearest(evaluation: Evaluation, suite: str) -> Published | None:
    """The row that an evaluation is to be held against: of its method, then of like settings, then of its family, then of the nearest size.

    None where no figure was published that the evaluation has too, and that is comparable.
    """
    method, kin, name = method_of(evaluation), family(evaluation.model), _squashed(evaluation.model)
    order = [method, *_NEXT.get(method, ()), "prompteol", "e5"]
    apart = incomparable(evaluation, suite)
    tasks = evaluation.suites.get(suite, {}).keys() - {"avg"} - apart.keys()

    def distance(row: Published) -> tuple[Any, ...]:
        size = abs(math.log(row.parameters / evaluation.parameters)) if evaluation.parameters > 0 else 0.0
        return (
            order.index(row.method) if row.method in order else len(order),
            sum(_setting(evaluation, name) != value for name, value in row.settings.items()) + (not row.settings and _quantised(evaluation)),
            bool(kin) and row.family != kin,
            round(size, 1),
            _squashed(row.model) not in name,
        )

    return min((row for row in of(suite) if tasks & row.tasks.keys() or ("avg" not in apart and row.avg is not None)), key=distance, default=None)


def _squashed(model: str) -> str:
    return "".join(character for character in model.casefold() if character.isalnum())


def _short(value: Any) -> str:
    """``4k``, ``1e5``, or the value as it is."""
    if isinstance(value, float):
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value // 1024}k" if isinstance(value, int) else str(value)


def _quantised(evaluation: Evaluation) -> bool:
    return bool(evaluation.engine.get("quantization", "none") != "none")


def _setting(evaluation: Evaluation, name: str) -> Any:
    """A setting in force as the published rows write it."""
    if name == "quantization":
        return evaluation.engine.get("quantization", "none")
    value = evaluation.settings.get(name)
    if name == "sliding_window":
        return 32768 if value == 0 else value or 4096  # No window is one as long as the positions; the released model's own is 4096.
    return value or 1.0e4  # rope_theta: the released model's own
