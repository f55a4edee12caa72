"""RePULSe against closed forms: tabular models with 64 outputs, a tiny transformer with all of its outputs enumerated.

The numbers come from an implementation that shares no code with this one; "original scale" is the mean over completions
of token means that the released code uses. Everything is float64 and exact to 1e-9 unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_algos.importance import group_log_softmax, log_weights
from rlhf_algos.loss.weighted_nll import WeightedNLLLoss
from rlhf_algos.target import Target
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.results import LossTerms, RewardOutput
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.reduction import count, weighted_sum

TARGET = Target(beta=-1.0)
ALL = torch.cartesian_prod(torch.arange(8), torch.arange(8))
"""Every output of the fixture, (a, b) in the order of 8 a + b."""
Q_SAMPLES = torch.tensor([(0, 1), (3, 5), (7, 2), (4, 4)])
P_SAMPLES = torch.tensor([(1, 1), (2, 6), (5, 0), (6, 3)])
BAD = [3, 6]


def near(value: Any, expected: Any, atol: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    value = torch.as_tensor(value, dtype=torch.float64).detach()
    torch.testing.assert_close(value, expected.expand_as(value), atol=atol, rtol=0)


@dataclass(eq=False)
class Table:
    """A model of two tokens: logits of the first, and of the second after each first one."""

    first_V: Tensor
    second_VV: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Log-probabilities (N, 2) of outputs (N, 2)."""
        first, second = self.first_V.log_softmax(0), self.second_VV.log_softmax(1)
        return torch.stack([first[outputs[:, 0]], second[outputs[:, 0], outputs[:, 1]]], 1)

    def live(self) -> Table:
        """A copy that collects gradients."""
        return Table(*(logits.clone().requires_grad_() for logits in (self.first_V, self.second_VV)))

    def grads(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.autograd.grad(loss, (self.first_V, self.second_VV), retain_graph=True, allow_unused=True)
        first, second = (torch.zeros_like(x) if g is None else g for x, g in zip((self.first_V, self.second_VV), found))
        return first, second


v = torch.arange(8, dtype=torch.float64)
u = v[:, None]
P = Table((1 + 0.7 * v).sin(), (3.1 + 1.3 * u + 0.7 * v).sin())
Q = Table((0.5 + 0.9 * v).cos(), (2.2 - 0.4 * u + 0.9 * v).cos())
P0 = Table(0.5 * (0.3 * v).sin(), 0.5 * (0.4 + 0.3 * v - 0.9 * u).sin())


def reward(outputs: Tensor) -> Tensor:
    a, b = outputs.double().unbind(1)
    return 2 * (1.1 * a + 0.3).sin() + 1.5 * (0.8 * b - 0.6 * a).cos()


def sigma(beta: float, p: Table = P) -> tuple[Tensor, Tensor]:
    """The target's probabilities of all outputs, and log Z."""
    log_unnormalized = p(ALL).sum(1) + beta * reward(ALL)
    log_z = log_unnormalized.logsumexp(0)
    return (log_unnormalized - log_z).exp(), log_z


def rollouts(outputs: Tensor, extras: Mapping[str, Tensor] | None = None, groups: list[int] | None = None) -> Rollouts:
    batch = make_batch([2] * len(outputs), groups=groups or [0] * len(outputs))
    batch.tokens_NT = outputs
    return batch.with_extras(**(extras or {}))


def on_q(outputs: Tensor, p: Table = P, q: Table = Q) -> Rollouts:
    return rollouts(outputs, {"actor.logprobs_NT": p(outputs).detach(), "old_logprobs_NT": q(outputs).detach()})


def credit(advantage: Any, batch: Rollouts, rewards_N: Tensor | None = None) -> Tensor:
    rewards = RewardOutput(reward(batch.tokens_NT) if rewards_N is None else rewards_N)
    return advantage(rewards, batch, batch.extras).advantages_NT  # type: ignore[no-any-return]


def reduced(terms: LossTerms, batch: Rollouts) -> Tensor:
    """Core's reduction in float64; that core agrees is asserted on the way."""
    mask, N = batch.mask_NT, len(batch)
    values = terms.values.masked_fill(~mask, 0.0)
    match terms.reduction.per:
        case "sequence":
            total = (values.sum(1) / mask.sum(1)).sum() / N
        case "prompt":
            total = values.sum() / len(batch.group_N.unique())
        case _:
            total = values.sum() / (N * terms.reduction.length)
    near(weighted_sum(terms.values, terms.reduction, batch) / count(terms.reduction, batch), total.detach(), atol=1e-5)
    return total


def loss_of(loss: Any, advantage: Any, batch: Rollouts, model: Table, minus: Tensor | float = 0.0) -> Tensor:
    """`loss` on the credit of `advantage`; `minus` is a constant taken off the log-probabilities (log psi is log q - log p)."""
    batch = batch.with_extras(advantages_NT=credit(advantage, batch))
    return reduced(loss({"logprobs_NT": model(batch.tokens_NT) - minus}, batch), batch)


ORIGINAL = WeightedNLLLoss("sequence")


def weights(beta: float, p: Table = P, q: Table = Q) -> tuple[Tensor, Tensor]:
    log_w = log_weights(p(Q_SAMPLES), q(Q_SAMPLES), beta * reward(Q_SAMPLES), torch.ones(4, 2).bool())
    return log_w, group_log_softmax(log_w, torch.zeros(4)).exp()
