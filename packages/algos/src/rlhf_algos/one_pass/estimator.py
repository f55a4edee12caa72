"""Base class of estimators of a linear reward: parameters, their average, a count of updates, and a state to store.

    estimator = Omd(d)
    estimator.step(z_BD)                # z = phi(chosen) - phi(rejected), B pairs
    estimator.theta_D                   # the reward is phi^T theta
    estimator.curvature.norm_inverse(z_BD)

All arithmetic is float64. Letters: B pairs, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_algos.one_pass.curvature import Curvature

__all__ = ["Estimator", "Iterates"]


class Estimator(Protocol):
    """An estimator of theta from a stream of pairs."""

    kind: ClassVar[str]
    d: int
    """features"""
    t: int
    """updates so far"""
    eta: float
    """step size; it has no effect where an estimator has no step"""
    theta_D: Tensor
    """current iterate, float64"""

    @property
    def average_D(self) -> Tensor:
        """Mean of the iterates theta_1 .. theta_{t+1} (Li et al. 2025, Algorithm 3)."""

    @property
    def curvature(self) -> Curvature:
        """H, at the present theta."""

    def step(self, z_BD: Tensor) -> None:
        """Take in a batch of pairs, chosen minus rejected."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs, tensors, numbers and texts."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; the next step then equals that of the estimator that gave it."""


class Iterates:
    """Parameters, their running sum and the count of updates; the base of estimators.

    Args:
        d: features.
        theta_D: where the first iterate is; zero if absent, as in the paper.
    """

    kind: ClassVar[str] = ""

    def __init__(self, d: int, theta_D: Tensor | None = None) -> None:
        if d < 1:
            raise UsageError(f"an estimator needs at least one feature, not {d}")
        self.d, self.t, self.eta = d, 0, 1.0
        self.theta_D = torch.zeros(d, dtype=torch.float64) if theta_D is None else theta_D.detach().double().clone()
        if self.theta_D.shape != (d,):
            raise UsageError(
                f"theta has shape {tuple(self.theta_D.shape)}; an estimator with {d} features needs the shape ({d},)"
            )
        self._sum_D = self.theta_D.clone()

    @property
    def average_D(self) -> Tensor:
        """Mean of the iterates theta_1 .. theta_{t+1}, (D,)."""
        return self._sum_D / (self.t + 1)

    def check_pairs(self, z_BD: Tensor) -> Tensor:
        """Return the pairs as float64 rows.

        Raises:
            UsageError: their width is another one, or one is not finite.
        """
        z_BD = z_BD.detach().double()
        if z_BD.dim() != 2 or z_BD.shape[1] != self.d:
            raise UsageError(f"pairs have shape {tuple(z_BD.shape)}; this estimator needs the shape (pairs, {self.d})")
        bad = (~z_BD.isfinite().all(1)).nonzero()
        if len(bad):
            raise UsageError(
                f"the features of pair {int(bad[0])} of {len(z_BD)} are not finite; check the model's dtype and "
                "that row"
            )
        return z_BD

    def take_iterate(self, theta_D: Tensor) -> None:
        """Take `theta_D` as the next iterate."""
        self.theta_D = theta_D
        self._sum_D = self._sum_D + theta_D
        self.t += 1

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "d": self.d, "t": self.t, "theta_D": self.theta_D, "sum_D": self._sum_D}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`.

        Raises:
            UsageError: it belongs to another estimator, or has another number of features.
        """
        if state.get("kind") != self.kind:
            raise UsageError(
                f"the stored state is of {state.get('kind')!r}, but this estimator is {self.kind!r}; choose the "
                "optimizer that wrote the state"
            )
        if state["d"] != self.d:
            raise UsageError(
                f"the stored state of {self.kind} has {state['d']} features, but this reward head has {self.d}; use "
                "the model that wrote the state, or start with a new estimator"
            )
        self.t = int(state["t"])
        self.theta_D, self._sum_D = state["theta_D"].clone(), state["sum_D"].clone()
