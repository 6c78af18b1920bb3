"""Offline embedding of Parquet corpora of any size with decoder LLMs on Ray.

    embed(input, output, model=…)  runs or continues the embedding job and returns its receipt
    open_run(output)               opens what a job wrote
    Embedder.load(model, …)        texts to vectors in a notebook, without Ray
    EmbedStage(model, …)           embedding as a stage of one's own Ray Data pipeline
    Representation                 templates, pooling, truncation: what decides a vector besides the weights

Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmemb_ray.embedders.embedder import Embedder
    from llmemb_ray.errors import LlmembError
    from llmemb_ray.pipeline.job import embed
    from llmemb_ray.pipeline.stage import EmbedStage
    from llmemb_ray.representation.representation import Representation
    from llmemb_ray.search.exact import search as search_run
    from llmemb_ray.shards.export import export
    from llmemb_ray.shards.receipt import Receipt
    from llmemb_ray.shards.run import Run, open_run
    from llmemb_ray.shards.verify import verify

_PLACES = {
    "EmbedStage": "llmemb_ray.pipeline.stage",
    "Embedder": "llmemb_ray.embedders.embedder",
    "LlmembError": "llmemb_ray.errors",
    "Receipt": "llmemb_ray.shards.receipt",
    "Representation": "llmemb_ray.representation.representation",
    "Run": "llmemb_ray.shards.run",
    "embed": "llmemb_ray.pipeline.job",
    "export": "llmemb_ray.shards.export",
    "open_run": "llmemb_ray.shards.run",
    "search_run": "llmemb_ray.search.exact:search",
    "verify": "llmemb_ray.shards.verify",
}

__all__ = ["EmbedStage", "Embedder", "LlmembError", "Receipt", "Representation", "Run", "__version__", "embed", "export", "open_run", "search_run", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
