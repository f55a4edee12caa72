"""Online mirror descent whose linear system is solved by conjugate gradient on the accumulated operator.

The update is that of `omd`; the D x D matrix is never formed. Past curvature is a diagonal plus `rank` directions
(`curvature.LowRank`): O(rank D) memory and time, constant in t. With rank >= D and enough steps of conjugate gradient it is
the exact update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_algos.one_pass.conjugate import conjugate_gradient
from rlhf_algos.one_pass.curvature import LowRank
from rlhf_algos.one_pass.estimator import Iterates
from rlhf_algos.one_pass.logistic import gradient_sum, hessian_product, slopes
from rlhf_algos.one_pass.projection import project
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OmdCg"]


class OmdCg(Iterates):
    """The estimator for large D.

    Args:
        d: features.
        damping: lambda, above 0.
        eta: step size.
        radius: B, the norm of theta at most; 0 does not project.
        rank: directions of past curvature that are kept; from D on, all of it.
        steps: applications of the operator per update at most, K.
        tolerance: relative residual at which conjugate gradient stops before.
        block: take the pairs of a step at once, not one after the other.
        theta_D: first iterate; zero if absent.
    """

    kind: ClassVar[str] = "omd_cg"

    def __init__(
        self,
        d: int,
        *,
        damping: float = 1.0,
        eta: float = 1.0,
        radius: float = 0.0,
        rank: int = 64,
        steps: int = 16,
        tolerance: float = 1e-12,
        block: bool = False,
        theta_D: Tensor | None = None,
    ) -> None:
        super().__init__(d, theta_D)
        self.eta, self.radius, self.block = eta, radius, block
        self.steps, self.tolerance = steps, tolerance
        self.curvature = LowRank.ridge(d, damping, min(rank, d))
        self.products = 0  # applications of the operator so far, its cost

    def step(self, z_BD: Tensor) -> None:
        """Take in pairs (B, D), chosen minus rejected."""
        z_BD = self.check_pairs(z_BD)
        for part_BD in (z_BD,) if self.block else z_BD.split(1):
            self._step(part_BD)

    def _step(self, z_BD: Tensor) -> None:
        weights_B = self.eta * slopes(z_BD, self.theta_D)

        def tilde(v_D: Tensor) -> Tensor:
            return self.curvature.apply(v_D) + hessian_product(z_BD, weights_B, v_D)

        solved = conjugate_gradient(tilde, gradient_sum(z_BD, self.theta_D), self.steps, self.tolerance)
        self.products += solved.products
        theta_D = self.theta_D - self.eta * solved.x_D

        if self.radius and float(theta_D.norm()) > self.radius:
            theta_D = self._project(theta_D, z_BD, weights_B)
        self.curvature.add(z_BD, slopes(z_BD, theta_D))
        self.take_iterate(theta_D)

    def _project(self, theta_D: Tensor, z_BD: Tensor, weights_B: Tensor) -> Tensor:
        """The projection in the norm of Htil, whose shifted systems have one unknown a kept direction."""
        memory = self.curvature
        factor_RD = torch.cat([memory.factor_RD, weights_B.sqrt()[:, None] * z_BD])
        tilde = LowRank(memory.diagonal_D, factor_RD, memory.rank)
        # (Htil + mu I)^{-1} Htil theta = theta - mu (Htil + mu I)^{-1} theta
        return project(theta_D, lambda mu: theta_D - mu * tilde.shifted_solve(theta_D, mu), self.radius)

    def state_dict(self) -> dict[str, Any]:
        factor_RD, room = self.curvature.factor_RD, 2 * self.curvature.rank
        empty_RD = factor_RD.new_zeros((room - len(factor_RD), self.d))  # one shape, whatever the number of rows
        memory = {
            "diagonal_D": self.curvature.diagonal_D,
            "factor_RD": torch.cat([factor_RD, empty_RD]),
            "rows": len(factor_RD),
            "rank": self.curvature.rank,
            "products": self.products,
        }
        return {**super().state_dict(), **memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.curvature = LowRank(
            state["diagonal_D"].clone(), state["factor_RD"][: int(state["rows"])].clone(), int(state["rank"])
        )
        self.products = int(state["products"])
