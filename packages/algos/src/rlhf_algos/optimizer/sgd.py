"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.optimizers import OptimizerProvider, parameter_groups
from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.errors import OptionError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch.nn import Parameter

__all__ = ["SGD"]


@dataclass(frozen=True)
class SGD(OptimizerProvider):
    """Stochastic gradient descent, with momentum if wanted (Polyak 1964; Nesterov 1983)."""

    momentum: float = 0.0
    """share of the last update that is added to the next one, 0 to 1"""
    nesterov: bool = False
    """take the gradient's part of the update twice, as Nesterov's momentum does"""
    weight_decay: float = 0.0
    """decay of matrices, added to the gradient"""

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "momentum", "weight_decay")
        finite(self, "weight_decay")
        if not self.momentum < 1:
            raise OptionError("momentum", f"must be below 1, not {self.momentum}")
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov", "needs momentum above 0")

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> torch.optim.Optimizer:
        groups = parameter_groups(named_parameters, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
