"""The last steps from pooled states to output vectors, shared by every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llmemb_ray.representation.representation import Representation


def finish(pooled_ND: torch.Tensor, representation: Representation) -> torch.Tensor:
    """Dimensions, then L2 normalisation, in float32.

    pooled_ND: [N, D] in any float dtype. Returns float32 [N, dimensions]. A zero vector stays zero.
    """
    vectors = pooled_ND.float()
    if representation.dimensions is not None:
        vectors = vectors[:, : representation.dimensions]
    if representation.normalize:
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return vectors
