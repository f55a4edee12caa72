"""One-pass reward modeling by online mirror descent, for many features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.optimizer.omd import OMD
from rlhf_core.contract.ranges import at_least

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_algos.one_pass import OmdCg

__all__ = ["OMDCG"]


@dataclass(frozen=True)
class OMDCG(OMD):
    """Online mirror descent (Li et al. 2025, eq. 3) whose system is solved by conjugate gradient on the accumulated operator.

    No matrix of features by features is formed: past curvature is a diagonal and `rank` directions. With as many directions
    and steps as features it is `omd`.
    """

    rank: int = 64
    """directions of past curvature that are kept; weaker ones count in the diagonal"""
    num_cg_steps: int = 16
    """maximum number of conjugate gradient steps per update; a small residual ends it earlier"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "rank", "num_cg_steps")

    def estimator(self, d: int, theta_D: Tensor | None) -> OmdCg:
        from rlhf_algos.one_pass import OmdCg

        return OmdCg(
            d,
            damping=self.damping,
            eta=self.lr,
            radius=self.radius,
            rank=self.rank,
            steps=self.num_cg_steps,
            block=self.updates == "block",
            theta_D=theta_D,
        )
