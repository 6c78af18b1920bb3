"""The contrastive objective of both papers: InfoNCE over in-batch negatives of all workers and hard negatives of each row.

Invariant: the gradient that w workers average is that of one worker with the whole batch. Knows no model and no data: vectors in,
a loss out.

Shapes: B rows of this worker, W of all workers together, K hard negatives a row, D dimensions, C = W · (1 + K) candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmemb_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Vectors of a batch, in any floating dtype and of any length.

    anchors: [B, D]; positives: [B, D]; negatives: [B, K, D], K may be 0
    anchor_ids: int64 [B]; candidate_ids: int64 [B, 1 + K], of the positive and the negatives: equal ids are equal texts
    """

    anchors: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    anchor_ids: torch.Tensor | None = None
    candidate_ids: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    loss: torch.Tensor
    """Mean over this worker's rows: averaged over workers of equal B it is the loss of the whole batch."""
    accuracy: float
    """Share of this worker's anchors whose positive is the nearest candidate."""
    masked: int
    """Candidates left out as false negatives, for this worker's anchors."""


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """ℓ_i = −log( e^{cos(a_i, p_i)/τ} / Σ_j e^{cos(a_i, c_j)/τ} ), c_j all positives and hard negatives (paper 1, section 3.3; paper 2, equation 2)."""

    temperature: float = 0.05
    """τ. Paper 1's code has 0.05 (its text 0.5), paper 2 0.02."""
    both_directions: bool = False
    """Also from each positive to all anchors, the mean of both."""
    dimensions: tuple[int, ...] = ()
    """Matryoshka: mean of the losses of the first so many dimensions, each normalised by itself; empty is all dimensions alone."""
    guide_margin: float | None = None
    """Leave out candidates whose similarity to the anchor in the guide's vectors exceeds the positive's less this margin."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"temperature: {self.temperature} must be above 0; paper 1 takes 0.05, paper 2 0.02")
        if any(size < 1 for size in self.dimensions):
            raise ConfigError(f"dimensions: {self.dimensions} must be positive numbers of dimensions")

    def __call__(self, rows: Rows, guide: Rows | None = None) -> Outcome:
        """guide: the same rows in the vectors of another model, for ``guide_margin``. Every worker must call it, with as many rows."""
        import torch

        width = rows.anchors.shape[1]
        if self.dimensions and max(self.dimensions) > width:
            raise ConfigError(f"dimensions: {max(self.dimensions)} are more than the {width} of the vectors")
        own = _own_rows(len(rows.anchors), rows.anchors.device)
        anchors, candidates = gathered(rows.anchors), _candidates(rows)
        masked, masked_back = self._masks(rows, guide, own)
        losses, right = [], 0.0
        for size in self.dimensions or (width,):
            scores = _cosines(rows.anchors[:, :size], candidates[:, :size]) / self.temperature
            scores = scores.masked_fill(masked, -torch.inf)
            losses.append(torch.nn.functional.cross_entropy(scores, own))
            if size == max(self.dimensions or (width,)):
                right = float((scores.argmax(dim=1) == own).double().mean())
            if self.both_directions:
                back = _cosines(rows.positives[:, :size], anchors[:, :size]) / self.temperature
                losses[-1] = (losses[-1] + torch.nn.functional.cross_entropy(back.masked_fill(masked_back, -torch.inf), own)) / 2
        return Outcome(loss=torch.stack(losses).mean(), accuracy=right, masked=int(masked.sum()))

    def _masks(self, rows: Rows, guide: Rows | None, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [B, C] and [B, W]: candidates that are no negatives of the anchor, and anchors that are none of the positive; never the row's own."""
        import torch

        together = len(own) * _workers()
        masked = torch.zeros(len(own), together * (1 + rows.negatives.shape[1]), dtype=torch.bool, device=own.device)
        back = masked[:, :together].clone()
        if rows.candidate_ids is not None:
            candidates, positive = _in_order(gathered(rows.candidate_ids)), rows.candidate_ids[:, :1]
            masked |= candidates[None] == positive
            back |= candidates[None, :together] == positive
            if rows.anchor_ids is not None:
                anchors, anchor = gathered(rows.anchor_ids)[None], rows.anchor_ids[:, None]
                masked |= candidates[None] == anchor
                masked[:, :together] |= anchors == anchor  # What answers an equal anchor answers this one.
                back |= (anchors == positive) | (anchors == anchor)
        if self.guide_margin is not None:
            if guide is None:
                raise ConfigError("guide_margin: needs the vectors of a guide")
            with torch.no_grad():
                for mask, near in ((masked, _cosines(guide.anchors, _candidates(guide))), (back, _cosines(guide.positives, gathered(guide.anchors)))):
                    mask |= near > near.gather(1, own[:, None]) - self.guide_margin
        mine = torch.arange(masked.shape[1], device=own.device)[None] == own[:, None]
        return masked & ~mine, back & ~mine[:, :together]


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all workers, in the order of their ranks, with gradients to each; this worker's own where it is alone."""

    if _workers() == 1:
        return tensor
    import torch
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(tensor.contiguous())))  # type: ignore[no-untyped-call]


def _workers() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _own_rows(count: int, device: torch.device) -> torch.Tensor:
    """int64 [B]: the places of this worker's rows among all workers'."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank() if _workers() > 1 else 0
    return torch.arange(rank * count, (rank + 1) * count, device=device)


def _candidates(rows: Rows) -> torch.Tensor:
    """[C, D]: the positives of all workers, then all their hard negatives."""
    import torch

    together = torch.cat([rows.positives[:, None], rows.negatives], dim=1)
    return _in_order(gathered(together))


def _in_order(rows: torch.Tensor) -> torch.Tensor:
    """[W, 1 + K, …] as [C, …], the positives first."""
    import torch

    return torch.cat([rows[:, 0], rows[:, 1:].flatten(0, 1)])


def _cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[B, C], in float32 at least."""
    import torch
    from torch.nn.functional import normalize

    dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
    return normalize(left.to(dtype), dim=1) @ normalize(right.to(dtype), dim=1).T
