"""Loaded models that turn token sequences into vectors. Knows nothing of Ray, units or shards."""

import os

# Threads of a matrix product that wait for each other by spinning stop dead when anything else wants their core:
# with two busy neighbours on two cores a small model ran ten times slower. Read when torch's OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from llmemb_ray.embedders.embedder import Embedded, Embedder, EmbedderSpec, settle

__all__ = ["Embedded", "Embedder", "EmbedderSpec", "settle"]
