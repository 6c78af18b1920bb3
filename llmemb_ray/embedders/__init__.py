"""Loaded models that turn token sequences into vectors. Knows nothing of Ray, units or shards."""

from llmemb_ray.embedders.embedder import Embedded, Embedder, EmbedderSpec, settle

__all__ = ["Embedded", "Embedder", "EmbedderSpec", "settle"]
