"""A torch optimizer for Algorithm 5 over any parameters: its Hessian products come from core's closure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_algos.one_pass.omd_memoryless import Direction, direction
from rlhf_algos.one_pass.sharding import is_sharded, local, shaped_like

if TYPE_CHECKING:
    from torch.nn import Parameter

__all__ = ["MemorylessStep"]


class MemorylessStep(torch.optim.Optimizer):
    """Steps against (H + lambda_t I)^{-1} g of the current batch.

    Where parameters are sharded, so are the vectors of the solver, and every inner product is summed over ranks.

    Args:
        parameters: what is trained.
        lr: eta.
        how: schedule and solver; with 0 steps the gradient itself is the direction.
        total: steps of the whole run.
    """

    def __init__(self, parameters: list[Parameter], lr: float, how: Direction, total: int) -> None:
        super().__init__(parameters, {"lr": lr})
        self.how, self.total = how, total
        self._first = parameters[0]
        self._sharded = any(is_sharded(parameter) for parameter in parameters)
        self.state[self._first] = {"t": 0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter; returns the loss."""
        loss = closure()
        parameters: list[Tensor] = self.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        memory = self.state[self._first]
        memory["t"] += 1
        found_D = self._direction(closure, parameters, _flatten(gradients), memory["t"])
        for parameter, part in zip(parameters, _split(found_D, parameters), strict=True):
            parameter.sub_(part, alpha=self.param_groups[0]["lr"])
        return loss

    def _direction(self, closure: Any, parameters: list[Tensor], g_D: Tensor, t: int) -> Tensor:
        """Return what the parameters move against: the numbers of this rank, one after the other."""
        if not self.how.steps:
            return g_D

        def hessian(v_D: Tensor) -> Tensor:
            with torch.enable_grad():
                return _flatten(closure.product(_split(v_D, parameters)))

        return direction(self.how, hessian, g_D, t, self.total, self._dot)

    def _dot(self, a_D: Tensor, b_D: Tensor) -> float:
        """Return the inner product over all ranks, added up in float64."""
        found = (a_D * b_D).sum(dtype=torch.float64)
        if self._sharded:
            torch.distributed.all_reduce(found)
        return float(found)


def _flatten(tensors: list[Tensor]) -> Tensor:
    """Return this rank's numbers of all tensors as one vector."""
    return torch.cat([local(tensor).flatten() for tensor in tensors])


def _split(vector_D: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return the parts of a vector as tensors of the shapes and shardings of `like`."""
    parts = vector_D.split([local(each).numel() for each in like])
    return [shaped_like(part, each) for part, each in zip(parts, like, strict=True)]
