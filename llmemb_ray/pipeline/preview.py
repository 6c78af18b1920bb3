"""What an embedding job would do, without doing it: no weights, no Ray, nothing written."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmemb_ray.config import EmbedSettings, parse_actors
from llmemb_ray.embedders.embedder import settle
from llmemb_ray.pipeline import planning


def preview(settings: EmbedSettings) -> dict[str, Any]:
    """The plan in figures, for printing or as JSON. Raises what ``embed`` would raise before its work begins."""
    spec = settle(settings)
    found, selection = planning.find(settings)
    actors = parse_actors(settings.actors)
    gpu = bool(settings.gpus_per_actor)
    plan = planning.make_plan(settings, spec, found, selection, actors=max(1, actors[1]) if actors else 1, gpu=gpu)
    bytes_ = sum(file.size for file in plan.files)
    return {
        "model": plan.model_name,
        "space": plan.space_digest,
        "files": len(plan.files),
        "bad_files": len(plan.bad_files),
        "bytes": bytes_,
        "rows": plan.rows,
        "units": sum(1 for _ in plan.units()),
        "text_column": plan.selection.text,
        "id_column": plan.selection.id,
        "template": spec.representation.form(settings.role).template,
        "max_tokens": spec.representation.max_tokens,
        "shared_prefix_tokens": len(spec.prompter(settings.role).shared_prefix),
        "dimensions": plan.dimension,
        "vector_bytes": plan.rows * plan.dimension * np.dtype(plan.dtype).itemsize,
    }
