"""The corpus: its files, its units, its texts, and rows that cannot become texts."""

from llmemb_ray.corpus.columns import Selection
from llmemb_ray.corpus.units import Piece, PlannedFile, Unit

__all__ = ["Piece", "PlannedFile", "Selection", "Unit"]
