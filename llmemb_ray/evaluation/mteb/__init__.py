"""mteb's own tasks on our embedders: what mteb asks of a model, answered by the pool and the embedding job.

``Encoder`` is mteb's EncoderProtocol, ``Searcher`` its SearchProtocol besides; ``tasks`` runs chosen tasks and keeps mteb's result files.
Within these modules ``import mteb`` is the library, which is an extra: ``pip install 'llmemb-ray[mteb]'``.
"""

from llmemb_ray.evaluation.mteb.encoder import Encoder

__all__ = ["Encoder"]
