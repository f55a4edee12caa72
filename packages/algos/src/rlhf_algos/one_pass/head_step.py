"""A torch optimizer around an estimator: features in, the head's weight out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_algos.one_pass.sharding import leads, write

if TYPE_CHECKING:
    from torch.nn import Parameter

    from rlhf_algos.one_pass.estimator import Estimator

__all__ = ["HeadStep"]

log = logging.getLogger("rlhf.one_pass")


class HeadStep(torch.optim.Optimizer):
    """The optimizer of a head whose weight (1, D) comes from an estimator.

    Args:
        parameters: all that is trained: the weight, and a bias, which no difference of rewards depends on and which stays.
        weight: the head's.
        lr: eta.
        estimator: the one that is run.
        average: write the mean of its iterates into the head, not the last one.
    """

    def __init__(
        self, parameters: list[Parameter], weight: Parameter, lr: float, estimator: Estimator, average: bool
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.weight, self.estimator, self.average = weight, estimator, average
        self._pairs_BD: Tensor | None = None
        self._warned = False
        self._show()

    def receive(self, features_NH: Tensor, row_N: Tensor) -> None:
        """Take the features of a step, chosen and rejected in turn, and the numbers of their rows in the data."""
        self._pairs_BD = features_NH[0::2] - features_NH[1::2]
        zero_B = (self._pairs_BD == 0).all(1)
        if bool(zero_B.any()) and not self._warned and leads():
            first = int(row_N[0::2][zero_B][0])
            log.warning(
                f"{int(zero_B.sum())} of {len(zero_B)} pairs have equal features for chosen and rejected, the first "
                f"in row {first + 1} of the data; such pairs have no effect on training (logged once)"
            )
            self._warned = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # core gives no closure
        """Let the estimator take the pairs in, and write theta into the head."""
        if self._pairs_BD is None:
            return
        self.estimator.eta = self.param_groups[0]["lr"]
        self.estimator.step(self._pairs_BD)
        self._pairs_BD = None
        self._show()

    def _show(self) -> None:
        """Write theta into the head, and the estimator's state to where checkpoints read it."""
        theta_D = self.estimator.average_D if self.average else self.estimator.theta_D
        write(self.weight, theta_D[None])
        self.state[self.weight] = self.estimator.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state; torch's own method would cast it to the head's dtype. Its key is a number, or a name under FSDP2."""
        (state,) = state_dict["state"].values()
        self.estimator.load_state_dict(state)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["lr"] = saved["lr"]
        self._show()
