"""The regularized maximum-likelihood estimate, refitted as pairs arrive: what one-pass estimators are compared with.

    theta = argmin  sum over all pairs so far of -log s(z^T theta)  +  damping / 2 |theta|^2

Newton's method with backtracking, or L-BFGS (Liu and Nocedal 1989) for many features, with last steps of Newton's method by
conjugate gradient. A fit starts from the last one and ends at a gradient norm of 1e-10. All pairs are kept: storage O(t D),
and every refit costs O(t).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_algos.one_pass.conjugate import conjugate_gradient
from rlhf_algos.one_pass.curvature import Dense
from rlhf_algos.one_pass.estimator import Iterates
from rlhf_algos.one_pass.logistic import gradient_sum, hessian_product, loss_sum, slopes
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mle"]

COARSE = 1e-4
"""Largest component of the gradient at which L-BFGS hands over: below, a line search sees rounding of the loss only."""


class Mle(Iterates):
    """The offline estimate of all pairs so far.

    Args:
        d: features.
        damping: ridge, above 0: without one, pairs that a hyperplane separates have no finite estimate.
        solver: `newton` (D x D systems), or `lbfgs` (no matrix).
        tolerance: norm of the gradient at which a fit ends.
        iterations: of one fit at most.
        every: steps from one refit to the next; pairs of the steps between wait.
    """

    kind: ClassVar[str] = "mle"

    def __init__(
        self,
        d: int,
        *,
        damping: float = 1.0,
        solver: Literal["newton", "lbfgs"] = "newton",
        tolerance: float = 1e-10,
        iterations: int = 500,
        every: int = 1,
        theta_D: Tensor | None = None,
    ) -> None:
        super().__init__(d, theta_D)
        if not damping > 0:
            raise UsageError(f"the curvature is singular with damping {damping}; damping must be above 0")
        self.damping, self.solver, self.tolerance, self.iterations = damping, solver, tolerance, iterations
        self.every = every
        self.batches = 0
        self.gradients = 0  # gradients of one pair that were computed so far, its cost
        self._parts: list[Tensor] = []

    @property
    def pairs_TD(self) -> Tensor:
        """All pairs so far, (T, D)."""
        self._parts = [torch.cat([torch.zeros((0, self.d), dtype=torch.float64), *self._parts])]
        return self._parts[0]

    @property
    def curvature(self) -> Dense:
        """damping I plus the curvature of all pairs at the present theta; made anew, O(t D^2)."""
        return Dense(torch.linalg.inv(self._hessian(self.pairs_TD, self.theta_D)))

    def step(self, z_BD: Tensor) -> None:
        """Keep pairs (B, D), chosen minus rejected, and refit if it is time."""
        self._parts.append(self.check_pairs(z_BD))
        self.batches += 1
        if self.batches % self.every == 0:
            self.fit()

    def fit(self) -> None:
        """Refit to all pairs so far, from the present theta.

        Raises:
            UsageError: the gradient does not get that small.
        """
        z_TD = self.pairs_TD
        theta_D = (self._newton if self.solver == "newton" else self._lbfgs)(z_TD, self.theta_D.clone())
        norm = float(self._gradient(z_TD, theta_D).norm())
        floor = 1e-15 * (float(z_TD.abs().sum()) + 1)  # rounding of a sum of that size
        if norm > max(self.tolerance, floor):
            raise UsageError(
                f"the fit of {len(z_TD)} pairs ended with a gradient of {norm:.1e}, above {self.tolerance:.0e}; "
                "raise damping, or use solver newton"
            )
        self.take_iterate(theta_D)

    def _gradient(self, z_TD: Tensor, theta_D: Tensor) -> Tensor:
        self.gradients += len(z_TD)
        return gradient_sum(z_TD, theta_D) + self.damping * theta_D

    def _hessian(self, z_TD: Tensor, theta_D: Tensor) -> Tensor:
        ridge_DD = self.damping * torch.eye(self.d, dtype=torch.float64)
        return ridge_DD + z_TD.T @ (slopes(z_TD, theta_D)[:, None] * z_TD)

    def _loss(self, z_TD: Tensor, theta_D: Tensor) -> float:
        return float(loss_sum(z_TD, theta_D) + self.damping / 2 * theta_D @ theta_D)

    def _newton(self, z_TD: Tensor, theta_D: Tensor, matrix: bool = True) -> Tensor:
        """Newton steps, each halved while it raises the loss by more than rounding; without a `matrix`, systems are solved by
        conjugate gradient."""
        for _ in range(self.iterations):
            g_D = self._gradient(z_TD, theta_D)
            if float(g_D.norm()) <= self.tolerance:
                break
            if matrix:
                down_D = torch.linalg.solve(self._hessian(z_TD, theta_D), g_D)
            else:
                weights_T = slopes(z_TD, theta_D)
                product = partial(self._product, z_TD, weights_T)
                down_D = conjugate_gradient(product, g_D, 10 * self.d, 1e-8).x_D
            loss, share = self._loss(z_TD, theta_D), 1.0
            while share > 1e-8 and self._loss(z_TD, theta_D - share * down_D) > loss + 1e-13 * abs(loss):
                share /= 2
            if float(down_D.norm()) <= 1e-16 * (1 + float(theta_D.norm())):
                break
            theta_D = theta_D - share * down_D
        return theta_D

    def _product(self, z_TD: Tensor, weights_T: Tensor, v_D: Tensor) -> Tensor:
        return hessian_product(z_TD, weights_T, v_D) + self.damping * v_D

    def _lbfgs(self, z_TD: Tensor, theta_D: Tensor) -> Tensor:
        """torch's L-BFGS with a line search for the strong Wolfe conditions, as far as differences of the loss are seen, and
        Newton's method for the last digits."""
        theta_D.requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [theta_D],
            max_iter=self.iterations,
            history_size=20,
            tolerance_grad=COARSE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            theta_D.grad = self._gradient(z_TD, theta_D.detach())
            return self._loss(z_TD, theta_D.detach())

        optimizer.step(closure)
        return self._newton(z_TD, theta_D.detach(), matrix=False)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "damping": self.damping,
            "pairs_TD": self.pairs_TD,
            "batches": self.batches,
            "gradients": self.gradients,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._parts = [state["pairs_TD"].clone()]
        self.batches, self.gradients = int(state["batches"]), int(state["gradients"])
