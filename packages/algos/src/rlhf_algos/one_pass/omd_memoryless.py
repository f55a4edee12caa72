"""The practical approximation of Li et al. 2025, Algorithm 5: no past curvature but a ridge that grows with time.

    v = (H_t(theta_t) + lambda_t I)^{-1} g_t(theta_t)    by K steps of conjugate gradient
    theta <- theta - eta v

g and H are means over the pairs of a step. lambda_t is in the linear system, and nothing is mixed in afterwards.

`released=True` computes what the released code does in its place (Online_RLHF at d19ccbc, its head trainer): the ridge is the
constant damping; the iteration has beta = 1 (`conjugate.released_iteration`); with K > 1 the result is mixed with the gradient,
damping g + (1 - damping) x; and once the schedule reaches 1, the step is the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from rlhf_algos.one_pass.conjugate import Apply, Dot, conjugate_gradient, inner, released_iteration
from rlhf_algos.one_pass.curvature import LowRank
from rlhf_algos.one_pass.damping import Strategy, damping_at, released_damping
from rlhf_algos.one_pass.estimator import Iterates
from rlhf_algos.one_pass.logistic import gradient_sum, hessian_product, slopes
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Direction", "OmdMemoryless", "direction"]


class Direction(NamedTuple):
    """Direction of a memoryless step."""

    damping: float = 0.8
    """lambda_0"""
    strategy: Strategy = "linear"
    """f of the schedule"""
    growth: float = 1.0
    """number of steps after which the schedule has its final value; a value of 1 or less means all steps of the run"""
    steps: int = 3
    """K"""
    released: bool = False
    """compute what the released code does"""

    def ridge(self, t: int, total: int) -> float:
        """Return lambda_t at step `t`, counted from 1; released: the constant, or 1 where its gate is closed."""
        if not self.released:
            return damping_at(self.strategy, self.damping, self.growth, t, total)
        gate = released_damping(self.strategy, self.damping, self.growth, t, total)
        return self.damping if gate < 1 else 1.0


def direction(how: Direction, hessian: Apply, g_D: Tensor, t: int, total: int, dot: Dot = inner) -> Tensor:
    """Return the direction that theta moves against, of g's shape.

    Args:
        how: the schedule and the solver.
        hessian: v -> H v of the current pairs.
        g_D: their gradient.
        t: the step, from 1.
        total: steps of the whole run.
        dot: inner product over all ranks.

    Raises:
        UsageError: the system is singular along the gradient.

    Where the very first direction has negative curvature, the gradient is returned (Nocedal and Wright 2006, Algorithm 7.1).
    """
    ridge = how.ridge(t, total)
    if how.released:
        if ridge >= 1:
            return g_D
        x_D = released_iteration(lambda v_D: hessian(v_D) + ridge * v_D, g_D, how.steps, dot).x_D
        return how.damping * g_D + (1 - how.damping) * x_D if how.steps > 1 else x_D
    solved = conjugate_gradient(lambda v_D: hessian(v_D) + ridge * v_D, g_D, how.steps, 1e-14, dot)
    if solved.bend > 0 or solved.products > 1:
        return solved.x_D
    if solved.bend < 0:  # a network's loss is not convex: Newton-CG then descends along the gradient
        return g_D
    raise UsageError(
        f"the curvature is singular along the gradient at step {t} with damping {ridge:.3g}; raise damping, or use "
        "damping-strategy constant"
    )


class OmdMemoryless(Iterates):
    """The estimator without memory of curvature, O(B D) per product.

    Args:
        d: features.
        total: T, steps of the whole stream, for the schedule.
        eta: step size.
        how: schedule, solver and compatibility.
        theta_D: first iterate; zero if absent.
    """

    kind: ClassVar[str] = "omd_memoryless"

    def __init__(
        self,
        d: int,
        *,
        total: int,
        eta: float = 1.0,
        how: Direction = Direction(),  # noqa: B008  # a named tuple is a value
        theta_D: Tensor | None = None,
    ) -> None:
        super().__init__(d, theta_D)
        self.total, self.eta, self.how = total, eta, how
        self._last_BD = torch.zeros((0, d), dtype=torch.float64)

    @property
    def curvature(self) -> LowRank:
        """lambda_t I plus the curvature of the last batch alone: nothing else is remembered."""
        ridge = self.how.ridge(max(1, self.t), self.total)
        factor_BD = slopes(self._last_BD, self.theta_D).sqrt()[:, None] * self._last_BD
        ridge_D = torch.full((self.d,), ridge, dtype=torch.float64)
        return LowRank(ridge_D, factor_BD / max(1, len(factor_BD)) ** 0.5, max(1, len(factor_BD)))

    def step(self, z_BD: Tensor) -> None:
        """Take in pairs (B, D), chosen minus rejected, in one step on their mean loss."""
        z_BD = self.check_pairs(z_BD)
        if not len(z_BD):
            return
        weights_B = slopes(z_BD, self.theta_D) / len(z_BD)
        g_D = gradient_sum(z_BD, self.theta_D) / len(z_BD)
        v_D = direction(self.how, lambda v: hessian_product(z_BD, weights_B, v), g_D, self.t + 1, self.total)
        self._last_BD = z_BD
        self.take_iterate(self.theta_D - self.eta * v_D)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "total": self.total, "last_BD": self._last_BD}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.total, self._last_BD = int(state["total"]), state["last_BD"].clone()
