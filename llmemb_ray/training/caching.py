"""Large batches in the memory of a micro-batch: gradient caching (Gao et al. 2021, arXiv 2101.06983).

Invariant: the gradients are those of one pass over the whole batch. The first pass makes the vectors without a graph; the loss's gradient
with respect to them is kept; the second pass makes each micro-batch again, from the same random state, and carries its part of that gradient back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


class RandomState:
    """The random numbers that a pass draws, to be drawn again: of the CPU and of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def again(self) -> Any:
        """Within the block the numbers are drawn as they were; after it they go on as if it had not been."""
        import torch

        with torch.random.fork_rng(devices=[self._device] if self._cuda is not None else []):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


def backward(
    encode: Callable[[Inputs], torch.Tensor],
    micro_batches: Sequence[Inputs],
    loss: Callable[[torch.Tensor], tuple[torch.Tensor, Result]],
    *,
    device: torch.device,
    held_back: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[torch.Tensor, Result]:
    """Adds the gradient of ``loss`` over all micro-batches to the parameters; returns the loss, detached, and what it gave beside.

    encode:    a micro-batch to vectors [n, D]
    loss:      all vectors of this worker, [N, D], to (loss, anything)
    held_back: entered for the second pass of all micro-batches but the last: DistributedDataParallel's ``no_sync``, so that gradients are
               exchanged once
    """
    import torch

    states, parts = [], []
    for inputs in micro_batches:
        states.append(RandomState(device))
        with torch.no_grad():
            parts.append(encode(inputs))
    vectors = torch.cat(parts).detach().requires_grad_()
    value, result = loss(vectors)
    value.backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    gradients = torch.split(vectors.grad, [len(part) for part in parts])
    for number, (inputs, state, gradient) in enumerate(zip(micro_batches, states, gradients, strict=True)):
        last = number == len(micro_batches) - 1
        with state.again(), contextlib.nullcontext() if last else held_back():
            encode(inputs).backward(gradient)  # type: ignore[no-untyped-call]
    return value.detach(), result
