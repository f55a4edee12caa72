"""Online mirror descent with a second-order model of the current loss, exact: Li et al. 2025 (arXiv 2502.07193), equation (3).

    Htil_t     = H_t + eta H_t(theta_t)                  curvature of the current pairs, at the old point
    theta'     = theta_t - eta Htil_t^{-1} g_t(theta_t)
    theta_t+1  = projection of theta' on |theta| <= B in the norm of Htil_t
    H_t+1      = H_t + H_t(theta_t+1)                    the same pairs, at the new point, weight 1

H_1 = damping I and theta_1 = 0. Time O(D^2) a pair, memory D x D, both constant in t: no pair is kept.

Several pairs in one step are either so many steps of one pair, in their order (`block=False`), or one step on their summed loss
and summed curvature (`block=True`). Sums, never means: a step on the mean of m pairs is that with damping / m.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_algos.one_pass.curvature import Dense
from rlhf_algos.one_pass.estimator import Iterates
from rlhf_algos.one_pass.logistic import gradient_sum, slopes
from rlhf_algos.one_pass.projection import project_by_inverse
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Omd"]


class Omd(Iterates):
    """The exact estimator, with a D x D state.

    Args:
        d: features.
        damping: lambda, above 0; the paper's analysis asks for 84 sqrt(2) eta (d L^2 + B L^3), practice for about 1.
        eta: step size; the analysis asks for log(2) / 2 + B L + 1, practice for 1.
        radius: B, the norm of theta at most; 0 does not project.
        block: take the pairs of a step at once, not one after the other.
        theta_D: first iterate; zero if absent.
    """

    kind: ClassVar[str] = "omd"

    def __init__(
        self,
        d: int,
        *,
        damping: float = 1.0,
        eta: float = 1.0,
        radius: float = 0.0,
        block: bool = False,
        theta_D: Tensor | None = None,
    ) -> None:
        super().__init__(d, theta_D)
        self.eta, self.radius, self.block = eta, radius, block
        self.curvature = Dense.ridge(d, damping)

    def step(self, z_BD: Tensor) -> None:
        """Take in pairs (B, D), chosen minus rejected."""
        z_BD = self.check_pairs(z_BD)
        if self.block:
            self._block(z_BD)
        else:
            for z_D in z_BD:
                self._one(z_D)

    def _one(self, z_D: Tensor) -> None:
        """One pair by Sherman-Morrison: O(D^2)."""
        inverse_DD = self.curvature.inverse_DD
        u_D = inverse_DD @ z_D
        spread = float(z_D @ u_D)  # z^T P z
        p = torch.sigmoid(z_D @ self.theta_D)
        c = self.eta * float(p * (1 - p))
        theta_D = self.theta_D + self.eta * float(1 - p) / (1 + c * spread) * u_D
        if self.radius and float(theta_D.norm()) > self.radius:
            tilde_DD = torch.addr(inverse_DD, u_D, u_D, alpha=-c / (1 + c * spread))
            theta_D = project_by_inverse(theta_D, tilde_DD, self.radius)
        q = torch.sigmoid(z_D @ theta_D)
        self.curvature.add_one(u_D, float(q * (1 - q)), spread)
        self.take_iterate(theta_D)

    def _block(self, z_BD: Tensor) -> None:
        """All pairs by Woodbury: O(B D^2)."""
        tilde = self.curvature.plus(z_BD, self.eta * slopes(z_BD, self.theta_D))
        theta_D = self.theta_D - self.eta * tilde.solve(gradient_sum(z_BD, self.theta_D))
        theta_D = project_by_inverse(theta_D, tilde.inverse_DD, self.radius)
        self.curvature = self.curvature.plus(z_BD, slopes(z_BD, theta_D))
        self.take_iterate(theta_D)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inverse_DD": self.curvature.inverse_DD}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        curvature = Dense(state["inverse_DD"].clone())
        _ = curvature.matrix_DD  # raises if it is singular
        self.curvature = curvature
