"""A first-order optimizer of torch as an estimator: one step on the mean loss of each batch, a baseline for the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_algos.one_pass.curvature import Dense
from rlhf_algos.one_pass.estimator import Iterates
from rlhf_algos.one_pass.logistic import gradient_sum
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FirstOrder"]


class FirstOrder(Iterates):
    """Theta under an optimizer of torch, such as `FirstOrder(d, lambda ps: torch.optim.SGD(ps, lr=0.1))`.

    Args:
        d: features.
        make: from a list of one parameter (D,) to its optimizer.
        theta_D: first iterate; zero if absent.
    """

    kind: ClassVar[str] = "first_order"

    def __init__(
        self, d: int, make: Callable[[list[Tensor]], torch.optim.Optimizer], theta_D: Tensor | None = None
    ) -> None:
        super().__init__(d, theta_D)
        self._parameter_D = self.theta_D.clone().requires_grad_(True)
        self._optimizer = make([self._parameter_D])

    @property
    def curvature(self) -> Dense:
        """None is kept.

        Raises:
            UsageError: always.
        """
        raise UsageError("a first-order estimator has no curvature; use omd, omd_cg or mle for uncertainty")

    def step(self, z_BD: Tensor) -> None:
        """Take in pairs (B, D), chosen minus rejected, in one step on their mean loss."""
        z_BD = self.check_pairs(z_BD)
        if not len(z_BD):
            return
        self._parameter_D.grad = gradient_sum(z_BD, self.theta_D) / len(z_BD)
        self._optimizer.step()
        self.take_iterate(self._parameter_D.detach().clone())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            self._parameter_D.copy_(self.theta_D)
        self._optimizer.load_state_dict(state["optimizer"])
