"""The contrastive objective: its value by hand, its masks, and its gradient over several workers and micro-batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from llmemb_ray.errors import ConfigError
from llmemb_ray.training import caching
from llmemb_ray.training.loss import InfoNCE, Rows


def random_rows(count: int, negatives: int, width: int = 6, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Rows(anchors=draw(count, width), positives=draw(count, width), negatives=draw(count, negatives, width))


def cosine(left: Any, right: Any) -> float:
    return float(left @ right / math.sqrt(float(left @ left) * float(right @ right)))


def by_hand(rows: Rows, temperature: float, left_out: set[tuple[int, int]] = frozenset()) -> float:  # type: ignore[assignment]
    """The formula of paper 1, section 3.3, term by term. left_out: (anchor, candidate)."""
    candidates = [*rows.positives, *rows.negatives.flatten(0, 1)]
    losses = []
    for number, anchor in enumerate(rows.anchors):
        terms = [0.0 if (number, place) in left_out else math.exp(cosine(anchor, other) / temperature) for place, other in enumerate(candidates)]
        losses.append(-math.log(terms[number] / sum(terms)))
    return float(np.mean(losses))


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_the_loss_is_the_formula_of_the_papers(negatives: int) -> None:
    rows = random_rows(5, negatives)
    made = InfoNCE(temperature=0.3)(rows)
    assert float(made.loss) == pytest.approx(by_hand(rows, 0.3), abs=1e-12)
    nearest = [
        max(range(5 * (1 + negatives)), key=lambda place: cosine(anchor, [*rows.positives, *rows.negatives.flatten(0, 1)][place])) for anchor in rows.anchors
    ]
    assert made.accuracy == np.mean([place == number for number, place in enumerate(nearest)])
    assert made.masked == 0


def test_both_directions_and_several_widths() -> None:
    rows = random_rows(5, 0)
    turned = Rows(anchors=rows.positives, positives=rows.anchors, negatives=rows.negatives)
    assert float(InfoNCE(temperature=0.3, both_directions=True)(rows).loss) == pytest.approx((by_hand(rows, 0.3) + by_hand(turned, 0.3)) / 2, abs=1e-12)
    narrow = Rows(anchors=rows.anchors[:, :2], positives=rows.positives[:, :2], negatives=rows.negatives[:, :, :2])
    assert float(InfoNCE(temperature=0.3, dimensions=(2, 6))(rows).loss) == pytest.approx((by_hand(narrow, 0.3) + by_hand(rows, 0.3)) / 2, abs=1e-12)
    with pytest.raises(ConfigError, match="7 are more than the 6"):
        InfoNCE(dimensions=(7,))(rows)


def test_equal_texts_are_no_negatives() -> None:
    rows = random_rows(3, 1)
    # Rows 0 and 1 have one positive; the negative of row 2 is the positive of row 0; the negative of row 0 is the anchor of row 1; rows 0 and 2 one anchor.
    rows = Rows(**vars(rows) | {"anchor_ids": torch.tensor([7, 8, 7]), "candidate_ids": torch.tensor([[1, 8], [1, 5], [3, 1]])})
    made = InfoNCE(temperature=0.3)(rows)
    left_out = {(0, 1), (0, 2), (0, 5), (1, 0), (1, 3), (1, 5), (2, 0)}
    assert made.masked == len(left_out)
    assert float(made.loss) == pytest.approx(by_hand(rows, 0.3, left_out), abs=1e-12)


def test_a_guide_leaves_out_what_it_finds_as_near_as_the_positive() -> None:
    rows, guide = random_rows(4, 1), random_rows(4, 1, seed=1)
    candidates = [*guide.positives, *guide.negatives.flatten(0, 1)]
    left_out = {
        (number, place)
        for number, anchor in enumerate(guide.anchors)
        for place, other in enumerate(candidates)
        if place != number and cosine(anchor, other) > cosine(anchor, guide.positives[number]) - 0.1
    }
    assert 0 < len(left_out) < 4 * 7
    made = InfoNCE(temperature=0.3, guide_margin=0.1)(rows, guide)
    assert made.masked == len(left_out)
    assert float(made.loss) == pytest.approx(by_hand(rows, 0.3, left_out), abs=1e-12)
    with pytest.raises(ConfigError, match="guide"):
        InfoNCE(guide_margin=0.1)(rows)


def network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 6)).double()


INPUTS = random_rows(8, 2, seed=3)
IDS = {"anchor_ids": torch.arange(100, 108), "candidate_ids": torch.tensor([[row, 50 + row, 4 if row == 1 else 70 + row] for row in range(8)])}
LOSS = InfoNCE(temperature=0.2, both_directions=True, dimensions=(3, 6))


def rows_of(vectors: torch.Tensor, start: int, stop: int) -> Rows:
    """Of the vectors of a part of the batch's texts, a text's row after the other: anchor, positive, negatives."""
    parts = vectors.view(stop - start, 4, -1)
    ids = {name: value[start:stop] for name, value in IDS.items()}
    return Rows(anchors=parts[:, 0], positives=parts[:, 1], negatives=parts[:, 2:], **ids)


def texts(start: int, stop: int) -> torch.Tensor:
    one = torch.cat([INPUTS.anchors[:, None], INPUTS.positives[:, None], INPUTS.negatives], dim=1)[start:stop]
    return one.flatten(0, 1)


def plain_gradient(model: torch.nn.Module) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = LOSS(rows_of(model(texts(0, 8)), 0, 8)).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_cached_gradients_are_those_of_the_whole_batch(size: int) -> None:
    model = network().eval()
    value, wanted = plain_gradient(model)
    model.zero_grad()
    micro = [texts(start, min(8, start + size)) for start in range(0, 8, size)]
    loss, _ = caching.backward(model, micro, lambda vectors: (LOSS(rows_of(vectors, 0, 8)).loss, None), device=torch.device("cpu"))
    assert float(loss) == pytest.approx(value, abs=1e-12)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).abs().max()) <= 1e-12


def test_dropout_draws_the_same_numbers_in_both_passes() -> None:
    model = network().train()
    micro = [texts(start, start + 2) for start in range(0, 8, 2)]
    torch.manual_seed(11)
    model.zero_grad()
    loss, _ = caching.backward(model, micro, lambda vectors: (LOSS(rows_of(vectors, 0, 8)).loss, None), device=torch.device("cpu"))
    after = torch.rand(1)
    cached = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    torch.manual_seed(11)
    model.zero_grad()
    whole = LOSS(rows_of(torch.cat([model(part) for part in micro]), 0, 8)).loss
    whole.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(float(whole.detach()), abs=1e-12)
    for parameter, gradient in zip(model.parameters(), cached, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).abs().max()) <= 1e-12
    assert torch.equal(after, torch.rand(1)), "the second pass leaves the random state where the first one did"


def worker(rank: int, workers: int, size: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=workers)
    model = torch.nn.parallel.DistributedDataParallel(network().eval())
    each = 8 // workers
    start, stop = rank * each, (rank + 1) * each
    micro = [texts(first, min(stop, first + size)) for first in range(start, stop, size)]
    loss, _ = caching.backward(
        model, micro, lambda vectors: (LOSS(rows_of(vectors, start, stop)).loss, None), device=torch.device("cpu"), held_back=model.no_sync
    )
    torch.distributed.all_reduce(loss)
    torch.save((loss / workers, [parameter.grad for parameter in model.parameters()]), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("workers", "size"), [(2, 4), (2, 1)])
def test_several_workers_have_the_gradient_of_one(workers: int, size: int, tmp_path: Path) -> None:
    value, wanted = plain_gradient(network().eval())
    torch.multiprocessing.spawn(worker, (workers, size, str(tmp_path)), nprocs=workers)  # type: ignore[no-untyped-call]
    for rank in range(workers):
        loss, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert float(loss) == pytest.approx(value, abs=1e-12)
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-9
