"""The vectors of a run in the form of another program: NumPy, faiss, Lance, Hugging Face datasets."""

from llmemb_ray.shards.export.exporting import Exported, export

__all__ = ["Exported", "export"]
