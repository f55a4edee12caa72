"""The offline estimate, refitted as pairs arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.optimizer.head import HeadOptimizer
from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_algos.one_pass import Mle

__all__ = ["MLE"]


@dataclass(frozen=True)
class MLE(HeadOptimizer):
    """Regularized maximum likelihood of all pairs so far, refitted to a gradient of 1e-10 from the last fit.

    The baseline of one-pass methods: it keeps the features of all pairs, and a fit reads all of them. `lr` and its schedule
    have no effect.
    """

    damping: float = 1.0
    """ridge: damping / 2 times the squared norm of theta is added to the summed loss; above 0"""
    solver: Literal["newton", "lbfgs"] = "newton"
    """Newton's method with a matrix of features by features; or L-BFGS, without one"""
    refit_every: int = 1
    """optimizer steps from one refit to the next"""

    grows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        finite(self, "damping")
        at_least(1, self, "refit_every")
        if not self.damping > 0:
            raise OptionError(
                "damping", f"must be above 0, not {self.damping}: separable pairs have no finite estimate"
            )

    def estimator(self, d: int, theta_D: Tensor | None) -> Mle:
        from rlhf_algos.one_pass import Mle

        return Mle(d, damping=self.damping, solver=self.solver, every=self.refit_every, theta_D=theta_D)
