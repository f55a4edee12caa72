"""Shared tables of the advantage tests: a ragged batch, and every estimator with its definition in loops over lists."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_algos.advantage.batch_mean import BatchMeanAdvantage
from rlhf_algos.advantage.dr_grpo import DrGRPOAdvantage
from rlhf_algos.advantage.gae import GAEAdvantage
from rlhf_algos.advantage.grpo import GRPOAdvantage
from rlhf_algos.advantage.reinforce import ReinforceAdvantage
from rlhf_algos.advantage.reinforce_pp import ReinforcePPAdvantage
from rlhf_algos.advantage.reinforce_pp_baseline import ReinforcePPBaselineAdvantage
from rlhf_algos.advantage.rloo import RLOOAdvantage
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.results import Credit, RewardOutput
from rlhf_core.testing.batches import make_batch

# ----------------------------------------------------------------------------------------------------------------------
# what estimators are given: ragged lengths, groups of three, two and one, a gap of environment tokens, a single token
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Given:
    rollouts: Rollouts
    rewards: RewardOutput
    values_NT: torch.Tensor

    def credit(self, advantage: Any) -> Credit:
        result: Credit = advantage(self.rewards, self.rollouts, {"values_NT": self.values_NT})
        return result

    def rows(self) -> list[Row]:
        """Actions only, as lists of floats."""
        mask_NT = self.rollouts.mask_NT
        return [
            Row(
                group=int(self.rollouts.group_N[i]),
                score=float(self.rewards.rewards_N[i]),
                rewards=self.rewards.rewards_NT[i][mask_NT[i]].tolist(),  # type: ignore[index]
                values=self.values_NT[i][mask_NT[i]].tolist(),
            )
            for i in range(len(self.rollouts))
        ]


@dataclass
class Row:
    group: int
    score: float
    rewards: list[float]
    values: list[float]


def given_batch(
    seed: int = 0, lengths: tuple[int, ...] = (5, 1, 3, 6, 2, 4), groups: tuple[int, ...] = (7, 7, 7, 2, 2, 4)
) -> Given:
    noise = torch.Generator().manual_seed(seed)
    rollouts = make_batch(list(lengths), groups=list(groups))
    rollouts.mask_NT[3, 2:4] = False  # a tool's answer between two turns
    shape = rollouts.mask_NT.shape
    rewards_NT = 0.1 * torch.randn(shape, generator=noise) * rollouts.mask_NT
    values_NT = torch.randn(shape, generator=noise)  # not zero outside the mask: estimators must not read it there
    return Given(rollouts, RewardOutput(torch.randn(len(lengths), generator=noise), rewards_NT), values_NT)


# ----------------------------------------------------------------------------------------------------------------------
# references: loops over lists
# ----------------------------------------------------------------------------------------------------------------------


def returns(scores: list[float], rows: list[Row], gamma: float) -> list[list[float]]:
    result = []
    for score, row in zip(scores, rows):
        rewards = [*row.rewards[:-1], row.rewards[-1] + score]
        result.append([sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))])
    return result


def gae(rows: list[Row], gamma: float, lam: float) -> tuple[list[list[float]], list[list[float]]]:
    advantages = []
    for row in rows:
        rewards, values = [*row.rewards[:-1], row.rewards[-1] + row.score], [*row.values, 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
        advantages.append(
            [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]
        )
    return advantages, [[a + v for a, v in zip(row_a, row.values)] for row_a, row in zip(advantages, rows)]


def whitened(nested: list[list[float]], std: bool = True) -> list[list[float]]:
    flat = [x for row in nested for x in row]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat) if std else 1.0
    return [[(x - mean) / deviation for x in row] for row in nested]


def others(row: Row, rows: list[Row]) -> list[Row]:
    return [other for other in rows if other.group == row.group and other is not row]


def group(row: Row, rows: list[Row]) -> list[float]:
    return [other.score for other in rows if other.group == row.group]


def grpo(rows: list[Row], std: bool) -> list[list[float]]:
    scores = []
    for row in rows:
        peers = group(row, rows)
        scale = statistics.stdev(peers) if std and len(peers) > 1 else 1.0
        scores.append((row.score - statistics.fmean(peers)) / scale)
    return returns(scores, rows, 1.0)


def rloo(rows: list[Row], per_token: str) -> list[list[float]]:
    if per_token == "after":
        scores = [
            r.score - statistics.fmean(o.score for o in others(r, rows)) if others(r, rows) else 0.0 for r in rows
        ]
        return returns(scores, rows, 1.0)
    total = {id(row): row.score + sum(row.rewards) for row in rows}
    scores = [
        total[id(r)] - statistics.fmean(total[id(o)] for o in others(r, rows)) if others(r, rows) else 0.0 for r in rows
    ]
    return [[score] * len(row.rewards) for score, row in zip(scores, rows)]


def batch_mean(rows: list[Row]) -> list[list[float]]:
    mean = statistics.fmean(row.score for row in rows)
    return returns([row.score - mean for row in rows], rows, 1.0)


TABLE: list[tuple[Any, Callable[[list[Row]], list[list[float]]]]] = [
    (GAEAdvantage(whiten="none"), lambda rows: gae(rows, 1.0, 0.95)[0]),
    (GAEAdvantage(gamma=0.9, lam=0.7, whiten="none"), lambda rows: gae(rows, 0.9, 0.7)[0]),
    (GAEAdvantage(lam=0.0, whiten="mean"), lambda rows: whitened(gae(rows, 1.0, 0.0)[0], std=False)),
    (GAEAdvantage(), lambda rows: whitened(gae(rows, 1.0, 0.95)[0])),
    (GRPOAdvantage(), lambda rows: grpo(rows, std=True)),
    (GRPOAdvantage(std=False), lambda rows: grpo(rows, std=False)),
    (DrGRPOAdvantage(), lambda rows: grpo(rows, std=False)),
    (ReinforcePPBaselineAdvantage(), lambda rows: whitened(grpo(rows, std=False))),
    (ReinforcePPBaselineAdvantage(whiten="none"), lambda rows: grpo(rows, std=False)),
    (BatchMeanAdvantage(), batch_mean),
    (ReinforceAdvantage(), lambda rows: returns([r.score for r in rows], rows, 1.0)),
    (RLOOAdvantage(), lambda rows: rloo(rows, "sum")),
    (RLOOAdvantage(per_token="after"), lambda rows: rloo(rows, "after")),
    (ReinforcePPAdvantage(), lambda rows: whitened(returns([r.score for r in rows], rows, 1.0))),
    (ReinforcePPAdvantage(gamma=0.9, whiten="none"), lambda rows: returns([r.score for r in rows], rows, 0.9)),
]
