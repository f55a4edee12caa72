"""Whole tensors and a rank's shares of them: what an optimizer's step needs of parameters that may be sharded (DTensor)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["is_sharded", "leads", "local", "shaped_like", "whole", "write"]


def is_sharded(tensor: Tensor) -> bool:
    """Return True if a rank may hold a share of `tensor` only."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Any) -> Tensor:
    """Return the whole of a tensor, without gradient. Collective where it is sharded."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full.detach()


def local(tensor: Any) -> Tensor:
    """Return this rank's share of a tensor, without gradient; all of it where it is whole."""
    own: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return own.detach()


def shaped_like(numbers: Tensor, tensor: Any) -> Tensor:
    """Return this rank's numbers as a tensor of the shape, dtype and sharding of `tensor`."""
    from torch.distributed.tensor import DTensor

    own = numbers.view(local(tensor).shape).to(tensor.dtype)
    if not is_sharded(tensor):
        return own
    sharded: Tensor = DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return sharded


def write(parameter: Any, values: Tensor) -> None:
    """Write whole values into a parameter; where it is sharded, this rank's share of them."""
    from torch.distributed.tensor import distribute_tensor

    own: Any = values.to(parameter.device, parameter.dtype)
    if is_sharded(parameter):
        own = distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)
    with torch.no_grad():
        parameter.copy_(own)


def leads() -> bool:
    """Return True in the first process, the one that logs."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
