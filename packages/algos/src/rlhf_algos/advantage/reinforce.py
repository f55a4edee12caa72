"""Plain returns, the credit of REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_algos.advantage.reinforce_pp import ReinforcePP
from rlhf_algos.whitening import Whiten

__all__ = ["Reinforce"]


@dataclass(frozen=True)
class Reinforce(ReinforcePP):
    """Discounted returns without a baseline (Williams 1992).

    OpenRLHF's `reinforce` whitens them, which is --advantage reinforce_pp.
    """

    whiten: Whiten = "none"
