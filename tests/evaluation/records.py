"""Evaluations written by hand, for what is made of them afterwards."""

from __future__ import annotations

from typing import Any

from llmemb_ray.evaluation.record import Evaluation
from llmemb_ray.representation import templates

TEMPLATES = {
    "prompteol": templates.PROMPTEOL,
    "prompteol-icl": templates.prompteol((templates.Demonstration("A jockey riding a horse.", "Equestrian"),)),
    "none": templates.NONE,
    "e5": templates.NONE,
}

STS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")


def made(
    model: str = "facebook/opt-125m", *, parameters: int = 125_000_000, method: str = "prompteol", suites: Any = None, template: str = "", **fields: Any
) -> Evaluation:
    """An evaluation whose averages are the means of its tasks."""
    template = template or TEMPLATES[method]
    form = {"template": template, "clean": "none"}
    query = form | {"template": templates.e5_query("Find it")} if method == "e5" else form
    representation = {"document": form, "query": query, "append_eos": method == "e5", "pooling": "last", "layer": -1} | fields.pop("representation", {})
    found = {suite: {task: float(figure) for task, figure in tasks.items()} for suite, tasks in (suites or {"sts": dict.fromkeys(STS, 50)}).items()}
    for tasks in found.values():
        tasks["avg"] = sum(tasks.values()) / len(tasks)
    defaults: dict[str, Any] = {
        "commit": "0123456789abcdef",
        "adapter": None,
        "space": f"space of {model} {method} {fields}",
        "dimension": 768,
        "engine": {"backend": "hf", "compute_dtype": "float32", "quantization": "none"},
    }
    return Evaluation(model=model, parameters=parameters, method=method, representation=representation, suites=found, **(defaults | fields))
