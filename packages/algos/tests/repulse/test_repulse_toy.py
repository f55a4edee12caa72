"""RePULSe's toy: on an enumerated model it makes bad outputs rarer than its baselines do, at the same budget and reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_algos.advantage.rloo import RLOOAdvantage
from rlhf_algos.advantage.transformed import TransformedAdvantage
from rlhf_algos.algorithm import rloo
from rlhf_algos.algorithm.repulse import RePULSe
from rlhf_algos.loss.reinforce import ReinforceLoss
from rlhf_algos.target import Target
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.options import KL, Sampling
from rlhf_core.contract.results import RewardOutput
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.reduction import count, weighted_sum

every_seed = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])

V, BAD = torch.arange(32.0), torch.tensor([5, 17, 29])
VALUE = (2 * (1.3 * V + 0.2).sin()).index_fill(0, BAD, -4.0)
START = torch.stack([(0.9 * V + 0.4).sin(), (0.9 * V + 1.4).sin()])
N = 64


def toy(terms: tuple[Term, ...], updates: int, seed: int) -> tuple[float, float]:
    """Trains two tables of logits on `terms` as the loop does; the exact log P(bad) and expected reward of the policy."""
    noise = torch.Generator().manual_seed(seed)
    tables = {name: START.clone().requires_grad_() for name in dict.fromkeys(term.role for term in terms)}
    optimizers = {
        name: torch.optim.Adam([table], lr={"actor": 0.05, "proposal": 0.1}[name]) for name, table in tables.items()
    }
    template = make_batch([2] * N, groups=[0] * N)
    for _ in range(updates):
        batches = {name: drawn(tables, name, template, noise) for name in dict.fromkeys(term.source for term in terms)}
        credited = [credited_batch(term, batches[term.source]) for term in terms]
        for name, table in tables.items():
            mine = [(term, batch) for term, batch in zip(terms, credited) if term.role == name]
            loss = sum(loss_of(term, batch, table) for term, batch in mine)
            optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([table], 1.0)
            optimizers[name].step()
    p = tables["actor"].detach().double().softmax(1)
    bad = p[:, BAD].sum(1)
    return math.log(float(bad[0] + (1 - bad[0]) * bad[1])), float((p @ VALUE.double()).sum())


def drawn(tables: Mapping[str, Tensor], source: str, template: Rollouts, noise: torch.Generator) -> Rollouts:
    """Samples of a table with their log-probabilities under it and under the policy."""
    tokens = torch.multinomial(tables[source].detach().softmax(1), N, replacement=True, generator=noise).T
    logprobs = {name: gathered(table.detach(), tokens) for name, table in tables.items()}
    extras = {"actor.logprobs_NT": logprobs["actor"], "old_logprobs_NT": logprobs[source]}
    return replace(template, tokens_NT=tokens).with_extras(**extras)


def gathered(table: Tensor, tokens: Tensor) -> Tensor:
    return table.log_softmax(1).T.gather(0, tokens)


def credited_batch(term: Term, batch: Rollouts) -> Rollouts:
    assert term.advantage is not None
    result: Any = term.advantage(RewardOutput(VALUE[batch.tokens_NT].sum(1)), batch, batch.extras)
    return batch.with_extras(advantages_NT=result.advantages_NT)


def loss_of(term: Term, batch: Rollouts, table: Tensor) -> Tensor:
    terms = term.loss({"logprobs_NT": gathered(table, batch.tokens_NT)}, batch)
    return term.weight * weighted_sum(terms.values, terms.reduction, batch) / count(terms.reduction, batch)


CHOSEN = ProviderChoices(RLOOAdvantage(), ReinforceLoss(aggregate="sequence"), Sampling(n=N))
REPULSE = RePULSe(target=Target(beta=-10.0), alpha=1.0, compat="original")
METHODS = {
    "reinforce": (rloo.RLOO(kl=KL(coef=0.0))(CHOSEN), 1000),
    "transformed": (rloo.RLOO(kl=KL(coef=0.0))(replace(CHOSEN, advantage=TransformedAdvantage())), 1000),
    "base proposal": (replace(REPULSE, proposal="base")(CHOSEN), 1000),
    "repulse": (REPULSE(CHOSEN), 500),
}
"""Terms and updates: 64,000 samples each."""


@every_seed
def test_repulse_makes_bad_outputs_rarer_than_its_baselines_at_the_same_budget_and_reward(seed):
    found = {name: toy(terms, updates, seed) for name, (terms, updates) in METHODS.items()}
    for name, (logprob, value) in found.items():
        assert value > 3.97, (name, found)
        assert logprob < -12.5 if name == "repulse" else logprob > -11.5, (name, found)
