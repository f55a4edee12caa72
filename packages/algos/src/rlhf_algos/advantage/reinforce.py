"""Plain returns, the credit of REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.advantage.reinforce_pp import ReinforcePPAdvantage
from rlhf_algos.whitening import Whiten

__all__ = ["ReinforceAdvantage"]


@dataclass(frozen=True)
class ReinforceAdvantage(ReinforcePPAdvantage):
    """Discounted returns without a baseline (Williams 1992).

    OpenRLHF's `reinforce` whitens them, which is --advantage reinforce_pp.
    """

    whiten: Whiten = "none"
