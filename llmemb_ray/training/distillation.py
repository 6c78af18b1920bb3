"""Learning from a teacher: its vectors of the anchors, or its scores of positives and negatives.

Invariant: as for the contrastive loss, the gradient that w workers average is that of one worker with the whole batch.

Shapes: B rows of this worker, W of all workers together, K hard negatives, D dimensions of the student, T of the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmemb_ray.errors import ConfigError
from llmemb_ray.training.loss import Rows, gathered

if TYPE_CHECKING:
    import torch

SIMILARITY_WEIGHT = 10.0
"""Of the differences between the similarities of student and teacher, which are squares of small numbers."""


def from_vectors(anchors: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 − cosine of each anchor's first T dimensions with the teacher's vector, and the squared differences of all pairs' cosines.

    anchors: [B, D], teacher: [B, T]. Raises ConfigError where T > D.
    """
    from torch.nn.functional import normalize

    width = teacher.shape[1]
    if width > anchors.shape[1]:
        raise ConfigError(f"distill: the teacher's vectors have {width} dimensions, the model's {anchors.shape[1]}; reduce the teacher's first")
    dtype = _wide(anchors)
    students, teachers = normalize(anchors[:, :width].to(dtype), dim=1), normalize(teacher.to(dtype), dim=1)
    apart = (1 - (students * teachers).sum(dim=1)).mean()
    similarities, wanted = students @ gathered(students).T, teachers @ gathered(teachers).T
    return apart + SIMILARITY_WEIGHT * (similarities - wanted).square().mean()


def from_scores(rows: Rows, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL divergence from the teacher's softmax over a row's positive and negatives to the student's, both scores divided by ``temperature``.

    scores: [B, 1 + K], in the scale of cosines
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax, normalize

    dtype = _wide(rows.anchors)
    candidates = normalize(torch.cat([rows.positives[:, None], rows.negatives], dim=1).to(dtype), dim=2)
    cosines = torch.einsum("bd,bkd->bk", normalize(rows.anchors.to(dtype), dim=1), candidates)
    return kl_div(log_softmax(cosines / temperature, dim=1), log_softmax(scores.to(dtype) / temperature, dim=1), log_target=True, reduction="batchmean")


def _wide(vectors: torch.Tensor) -> torch.dtype:
    import torch

    return torch.float64 if vectors.dtype == torch.float64 else torch.float32
