"""Parameters spread over all workers (FSDP2), and whole tensors to and from them.

Invariant: between a forward or backward pass and the next, a worker holds its share of each parameter; so what reads or sets weights sees shares
only. Knows layers and tensors, nothing of adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmemb_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch


def decoder_layers(module: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """The model's decoder layers: its list of ``count`` modules. Raises ConfigError if it has none."""
    import torch

    for part in module.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == count:
            return list(part)
    raise ConfigError(f"shard_parameters: {type(module).__name__} has no list of {count} decoder layers; leave shard_parameters out")


def shard(module: torch.nn.Module, layers: list[torch.nn.Module], device: torch.device) -> None:
    """Spreads the layers, then the rest, over the workers, in place. Every worker must call it, after the process group was started.

    A module whose weights lie in host memory is moved to the device a layer at a time, and its share alone stays there.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [*layers, module]:
        # The root too gives up its whole parameters after a pass: an evaluation would leave them behind, and stale once weights are loaded.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    for part in module.modules():  # Scales of quantised layers: no parameters, each worker has them whole.
        if getattr(part, "quant_state", None) is not None:
            part.quant_state.to(device)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a share; every worker must call it. Others as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as ``like`` lies: its share where that is spread, on its device. Nothing is sent: each worker has the whole."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def hold_back(module: Any, held: bool) -> None:
    """Whether backward passes leave gradients where they are, whole, in place of spreading their mean."""
    module.set_requires_gradient_sync(not held)
