"""Loaded models that turn token sequences into vectors. Knows nothing of Ray, units or shards."""

import os

# Threads of a matrix product that wait for each other by spinning lose their core to anything else that wants it:
# beside two busy processes on two cores a small model ran two to six times slower (benchmarks/README.md). Read when
# torch's OpenMP is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from llmemb_ray.embedders.embedder import Embedded, Embedder, EmbedderSpec, settle

__all__ = ["Embedded", "Embedder", "EmbedderSpec", "settle"]
