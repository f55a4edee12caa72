"""The base of pair selectors: an advantage that chooses two completions of each prompt and credits them +1 and -1.

A selector declares one method, `choose`. It works on plain numbers, so that recipes and readers of files call it, too. As an
advantage, it serves `online_dpo` and every other algorithm of pairs. The reward decides which of the two is the chosen one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.groups import require_groups
from rlhf_algos.ranges import check_ranges
from rlhf_algos.selection.candidates import Candidates, label_pair
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import UNCERTAINTY, Credit, Metric
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["PairSelector"]


@dataclass(frozen=True)
class PairSelector(Advantage):
    """Base class of pair selectors. This is not a selector itself."""

    min_gap: float = 0.0
    """largest difference of rewards at which a pair is left out"""
    keep_ties: bool = False
    """keep pairs of equal rewards, in the order in which the selector chose them"""
    seed: int = 0
    """seed of random choices, combined with the prompt and the step"""

    min_samples: ClassVar[int] = 2
    selects: ClassVar[str] = "pairs"
    """the rows are pairs that the advantage chose, as losses on pairs need"""

    def __post_init__(self) -> None:
        check_ranges(self, min_gap="[0, inf)")

    def choose(self, candidates: Candidates) -> tuple[int, int] | None:
        """Return two different candidates to compare, or None if there is no such pair."""
        raise NotImplementedError

    def pair(self, rewards_G: Tensor, *key: int, covariance_GG: Tensor | None = None) -> tuple[int, int] | None:
        """Return the chosen and the rejected candidate of a prompt, or None if the pair is left out.

        Args:
            rewards_G: rewards of the prompt's completions, which also decide which one of the pair is preferred.
            key: numbers that identify prompts and steps, to seed random choices.
            covariance_GG: how uncertain the rewards are together, if known.
        """
        rewards_G = rewards_G.double()
        pair = self.choose(Candidates(rewards_G, covariance_GG, self.generator(*key))) if len(rewards_G) > 1 else None
        if pair is None:
            return None
        chosen, rejected = label_pair(pair, rewards_G)
        gap = float(rewards_G[chosen] - rewards_G[rejected])
        return (chosen, rejected) if gap > self.min_gap or (self.keep_ties and gap == 0) else None

    def generator(self, *key: int) -> Generator:
        """Return a generator that depends on the seed and the key alone."""
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        require_groups(rollouts, self)
        rewards_N, std_N = rewards.total_N, reported_uncertainty(rewards)
        groups = _groups(rollouts)
        pairs, regrets = [], []
        for uid, rows in groups:
            rewards_G = rewards_N[rows]
            covariance_GG = None if std_N is None else torch.diag(std_N[rows].square())
            pair = self.pair(rewards_G, uid, rollouts.step.number, covariance_GG=covariance_GG)
            if pair is not None:
                pairs += [rows[pair[0]], rows[pair[1]]]
                regrets.append(rewards_G.max() - rewards_G[list(pair)].mean())
        sign_N = torch.zeros(len(rewards_N))
        sign_N[pairs[0::2]], sign_N[pairs[1::2]] = 1.0, -1.0
        share = Metric(torch.tensor(len(pairs) / 2), torch.tensor(float(len(groups))))
        regret = Metric.over(torch.stack(regrets)) if regrets else Metric(torch.tensor(0.0), torch.tensor(0.0))
        return Credit(
            sign_N[:, None] * rollouts.mask_NT,
            rows=torch.tensor(pairs, dtype=torch.long),
            metrics={"pairs/share": share, "pairs/regret": regret},
        )


def reported_uncertainty(rewards: RewardOutput) -> Tensor | None:
    """Return the standard deviations (N,) that the reward reports as its metric `uncertainty`, float64; None if it does not."""
    std_N = rewards.metrics.get(UNCERTAINTY)
    return None if std_N is None else std_N.double()


def _groups(rollouts: Rollouts) -> Sequence[tuple[int, list[int]]]:
    """Return the number of each prompt with the rows of its completions, in the order of the groups' numbers."""
    uids_N = rollouts.extras.get("uids_N", rollouts.group_N).tolist()
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(rollouts.group_N.tolist()):
        rows.setdefault(group, []).append(row)
    return [(uids_N[members[0]], members) for _, members in sorted(rows.items())]
