"""One-pass reward modeling by online mirror descent, exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_algos.optimizer.head import HeadOptimizer
from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_algos.one_pass import Omd, OmdCg

__all__ = ["OMD"]


@dataclass(frozen=True)
class OMD(HeadOptimizer):
    """Online mirror descent with second-order information (Li et al. 2025, eq. 3).

    Time and memory are constant in the number of pairs: the state is a matrix of features by features. `lr` is eta: 1 makes
    each step a Newton step on past curvature plus the current loss.
    """

    damping: float = 1.0
    """lambda, the curvature before any pair; in units of squared feature differences, above 0"""
    radius: float = 0.0
    """largest norm of theta; a longer one is projected back in the norm of the curvature; 0 does not project"""
    updates: Literal["rank_one", "block"] = "rank_one"
    """one step per pair, in the order of the data; or one step on the summed loss and curvature of a batch"""
    average: bool = False
    """write the mean of all iterates into the head, as the active setting does (Algorithm 3)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "damping", "radius")
        at_least(0, self, "radius")
        if not self.damping > 0:
            raise OptionError("damping", f"must be above 0, not {self.damping}: the curvature would be singular")

    @property
    def averages(self) -> bool:
        return self.average

    def estimator(self, d: int, theta_D: Tensor | None) -> Omd | OmdCg:
        from rlhf_algos.one_pass import Omd

        block = self.updates == "block"
        return Omd(d, damping=self.damping, eta=self.lr, radius=self.radius, block=block, theta_D=theta_D)
