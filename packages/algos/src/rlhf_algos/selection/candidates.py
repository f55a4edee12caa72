"""Candidates: the completions of one prompt, as a pair selector sees them.

G counts the completions. Rewards and covariances are float64. A covariance belongs to the model that predicts the rewards: with
a linear reward it is Phi_GD H^-1 Phi_GD^T, and the norm ||phi_i - phi_j|| in H^-1 is the standard deviation of a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = ["Candidates", "collapse_duplicates", "descending", "label_pair"]


@dataclass(frozen=True)
class Candidates:
    """The completions of one prompt."""

    rewards_G: Tensor
    """float64, predicted rewards"""
    covariance_GG: Tensor | None = None
    """float64 covariance of the rewards; None for a reward without uncertainty"""
    generator: Generator | None = None
    """random generator, seeded per prompt; torch's default generator by default"""

    def __len__(self) -> int:
        return len(self.rewards_G)

    def known_covariance(self, asker: object) -> Tensor:
        """Return the covariance.

        Raises:
            UsageError: the reward gives no uncertainty.
        """
        if self.covariance_GG is None:
            raise UsageError(
                f"{type(asker).__name__} needs the uncertainty of each reward, but this reward reports none; choose "
                f"{run_option('reward', 'uncertain')}, or a reward with a metric 'uncertainty'"
            )
        return self.covariance_GG

    def gap_std(self, asker: object) -> Tensor:
        """Return the standard deviation of every difference of two rewards (G, G); zero on the diagonal."""
        covariance_GG = self.known_covariance(asker)
        variance_G = covariance_GG.diagonal()
        variance_GG: Tensor = variance_G[:, None] + variance_G[None, :] - 2 * covariance_GG
        return variance_GG.clamp(min=0).sqrt()

    def draw(self, asker: object) -> Tensor:
        """Return one sample of the rewards' normal distribution (G,): Thompson sampling."""
        values_G, vectors_GG = torch.linalg.eigh(self.known_covariance(asker))
        noise_G = torch.randn(len(self), dtype=torch.float64, generator=self.generator)
        drawn_G: Tensor = self.rewards_G + vectors_GG @ (values_G.clamp(min=0).sqrt() * noise_G)
        return drawn_G

    def draw_other(self, taken: int) -> int:
        """Return a uniform choice among all candidates but `taken`; there are at least two."""
        other = int(torch.randint(len(self) - 1, (), generator=self.generator))
        return other + (other >= taken)


def descending(rewards_G: Tensor) -> list[int]:
    """Return the candidates from the highest reward to the lowest; equal ones keep their order."""
    order: list[int] = torch.argsort(rewards_G, descending=True, stable=True).tolist()
    return order


def label_pair(pair: tuple[int, int], oracle_G: Tensor) -> tuple[int, int]:
    """Return the pair with the preferred candidate first: the oracle swaps it only if the first scores strictly lower."""
    first, second = pair
    return (second, first) if bool(oracle_G[first] < oracle_G[second]) else pair


def collapse_duplicates(texts: list[str], rewards_G: Tensor) -> Tensor:
    """Return the rewards with every copy of a text carrying the reward of its last copy (G,)."""
    last = {text: number for number, text in enumerate(texts)}
    return rewards_G[torch.tensor([last[text] for text in texts])]
