"""The deployment setting (arXiv 2502.07193, algorithm 4): each round two answers are shown, a user prefers one, regret is
counted.

    round = Deployment(Omd(d), OptimisticPairs())
    first, second = round.choose(features_GD, t)
    round.hear(features_GD, first, second, first_preferred=True)

Regret of a round is the best answer's utility minus the mean utility of the two that were shown, so that a bad second answer
costs as much as a bad first one. Letters: G answers, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_algos.selection.candidates import Candidates
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from rlhf_algos.one_pass.estimator import Estimator
    from rlhf_algos.selection.selector import PairSelector

__all__ = ["Deployment", "SimulatedUser", "round_regret"]


@dataclass
class Deployment:
    """An estimator of the user's utility, and a rule for what to show."""

    estimator: Estimator
    """its state changes with every answer"""
    selector: PairSelector
    """chooses by the present estimate"""

    def choose(self, features_GD: Tensor, *key: int) -> tuple[int, int]:
        """Return the answers to show: the selector's pair, or the best one twice where it has none.

        The first two are shown while the estimate does not distinguish answers.

        Args:
            features_GD: of the answers to one prompt.
            key: numbers of this round, for what is left to chance.
        """
        features_GD = features_GD.double()
        covariance_GG = features_GD @ self.estimator.curvature.solve(features_GD).T
        rewards_G = features_GD @ self.estimator.theta_D
        pair = self.selector.choose(Candidates(rewards_G, covariance_GG, self.selector.generator(*key)))
        best = int(rewards_G.argmax())
        return pair or ((best, best) if bool(rewards_G.max() > rewards_G.min()) else (0, 1))

    def hear(self, features_GD: Tensor, first: int, second: int, first_preferred: bool) -> None:
        """Take in which of two answers the user prefers: one update, in constant time.

        One answer shown twice teaches nothing.
        """
        if first == second:
            return
        z_D = (features_GD[first] - features_GD[second]).double()
        self.estimator.step((z_D if first_preferred else -z_D)[None])


@dataclass
class SimulatedUser:
    """A user who prefers by the Bradley-Terry model: P(first preferred) = sigmoid((u_first - u_second) / temperature)."""

    generator: Generator
    """random generator"""
    temperature: float = 1.0
    """above 0; towards 0 the better answer always wins"""

    def prefers_first(self, utility_G: Tensor, first: int, second: int) -> bool:
        """Return True if the user prefers `first` to `second`."""
        p = torch.sigmoid((utility_G[first] - utility_G[second]).double() / self.temperature)
        return bool(torch.rand((), dtype=torch.float64, generator=self.generator) < p)


def round_regret(utility_G: Tensor, first: int, second: int) -> float:
    """Return the best utility minus the mean of the two shown; 0 or more."""
    return float(utility_G.max() - (utility_G[first] + utility_G[second]) / 2)
