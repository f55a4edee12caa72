"""Muon: the momentum of a matrix, orthogonalized by a Newton-Schulz iteration (Jordan et al. 2024).

    M <- mu M + (1 - mu) G                       momentum
    U  = (1 - mu) G + mu M                       Nesterov
    O  = NewtonSchulz(U) ~ U (U^T U)^(-1/2)      all singular values near 1
    W <- (1 - lr wd) W - lr s O

https://kellerjordan.github.io/posts/muon, and Liu et al. 2025 (arXiv:2502.16982) for the scale s and the weight decay.
Departure from the first implementation: the iteration runs in float32, not bfloat16, so that ranks and micro-batches agree.

A matrix that is sharded (DTensor) keeps its momentum sharded. Its update is gathered, orthogonalized on every rank, and each
rank takes its share.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["MuonOptimizer", "newton_schulz"]

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic a x + b x^3 + c x^5, steep at 0: five iterations bring [1e-3, 1] near 1."""


def newton_schulz(update: Tensor, iterations: int) -> Tensor:
    """Return `update` (rows, columns) with the quintic applied `iterations` times to its singular values.

    They are scaled into [0, 1] first.
    """
    X = update.float() / (update.float().norm() + 1e-7)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    for _ in range(iterations):
        S = X @ X.T
        X = A * X + (B * S + C * S @ S) @ X
    return (X.T if tall else X).to(update.dtype)


class MuonOptimizer(torch.optim.Optimizer):
    """Groups with `momentum` are trained by Muon, groups with `betas` by AdamW."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # core gives no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update = self._muon(parameter, group) if "momentum" in group else self._adamw(parameter, group)
                    parameter.add_(update, alpha=-group["lr"])

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the orthogonalized momentum, scaled."""
        gradient: Any = parameter.grad
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - group["momentum"])
        update: Any = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        rows, columns = update.shape
        size = 0.2 * math.sqrt(max(rows, columns)) if group["scale"] == "adamw" else math.sqrt(max(1, rows / columns))
        if not isinstance(update, DTensor):
            return size * newton_schulz(update, group["iterations"])
        whole = size * newton_schulz(update.full_tensor(), group["iterations"])
        return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return AdamW's update, without the decay (Loshchilov and Hutter 2019)."""
        state, (first, second) = self.state[parameter], group["betas"]
        gradient: Any = parameter.grad
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        square = state.setdefault("square", torch.zeros_like(parameter))
        state["steps"] = t = state.get("steps", 0) + 1
        mean.lerp_(gradient, 1 - first)
        square.lerp_(gradient.square(), 1 - second)
        return (mean / (1 - first**t)) / ((square / (1 - second**t)).sqrt() + group["eps"])
