"""Deployment: regret by hand, what a simulated user says, and which rules stop paying for their ignorance (spec, D.6)."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_algos.advantage.best_worst import BestWorstPairs
from rlhf_algos.advantage.optimistic import OptimisticPairs
from rlhf_algos.advantage.random_pair import RandomPairs
from rlhf_algos.one_pass import Omd
from rlhf_algos.selection.deployment import Deployment, SimulatedUser, round_regret
from rlhf_algos.selection.selector import PairSelector


def cumulative_regret(selector: PairSelector, rounds: int, seed: int, d: int = 8, arms: int = 16) -> list[float]:
    """Cumulative regret after each round: d = 8, 16 arms on the unit sphere, |theta*| = 3."""
    noise = torch.Generator().manual_seed(seed)
    theta_D = torch.randn(d, dtype=torch.float64, generator=noise)
    theta_D *= 3 / theta_D.norm()
    user, deployment = SimulatedUser(noise), Deployment(Omd(d), selector)
    total, history = 0.0, []
    for t in range(rounds):
        features_GD = torch.randn(arms, d, dtype=torch.float64, generator=noise)
        features_GD /= features_GD.norm(dim=1, keepdim=True)
        utility_G = features_GD @ theta_D
        pair = deployment.choose(features_GD, t)
        total += round_regret(utility_G, *pair)
        deployment.hear(features_GD, *pair, user.prefers_first(utility_G, *pair))
        history.append(total)
    return history


def test_optimism_stops_paying_and_random_and_worst_answers_do_not() -> None:
    def growth(selector: PairSelector, seeds: int) -> tuple[float, float]:
        runs = [cumulative_regret(selector, 2000, seed) for seed in range(seeds)]
        early, late = (sum(run[t - 1] for run in runs) / seeds for t in (500, 2000))
        return late / early, late

    ratio, regret = growth(OptimisticPairs(beta=0.3), 4)
    assert ratio < 2.2
    assert 100 < regret < 230, "163 over 20 seeds in the specification"
    for selector, expected in ((BestWorstPairs(), 3598), (RandomPairs(), 3615)):
        ratio, regret = growth(selector, 1)
        assert ratio > 3.5
        assert regret == pytest.approx(expected, rel=0.1)


def test_regret_is_that_of_both_answers() -> None:
    utility_G = torch.tensor([1.0, 3.0, 2.0])
    assert round_regret(utility_G, 1, 1) == 0.0
    assert round_regret(utility_G, 1, 2) == 0.5
    assert round_regret(utility_G, 0, 2) == 1.5


def test_a_simulated_user_follows_bradley_terry() -> None:
    utility_G = torch.tensor([0.0, 0.7])
    for temperature in (1.0, 0.5):
        user = SimulatedUser(torch.Generator().manual_seed(0), temperature)
        share = sum(user.prefers_first(utility_G, 1, 0) for _ in range(4000)) / 4000
        assert share == pytest.approx(1 / (1 + math.exp(-0.7 / temperature)), abs=0.02)


def test_what_is_heard_moves_the_estimate_towards_the_preferred_answer() -> None:
    features_GD = torch.eye(3, dtype=torch.float64)
    for first_preferred, sign in ((True, 1.0), (False, -1.0)):
        deployment = Deployment(Omd(3), OptimisticPairs())
        deployment.hear(features_GD, 0, 2, first_preferred)
        assert float(deployment.estimator.theta_D[0]) * sign > 0.1
        assert float(deployment.estimator.theta_D[0]) == -float(deployment.estimator.theta_D[2])


def test_where_no_pair_is_worth_it_the_best_answer_is_shown_alone() -> None:
    features_GD = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    deployment = Deployment(Omd(2), OptimisticPairs(beta=0.01))
    assert deployment.choose(features_GD) == (0, 1), "nothing is known yet"
    for _ in range(30):
        deployment.hear(features_GD, 1, 0, True)
    assert deployment.choose(features_GD) == (1, 1)
    before_D = deployment.estimator.theta_D.clone()
    deployment.hear(features_GD, 1, 1, True)
    assert torch.equal(deployment.estimator.theta_D, before_D)
    assert deployment.estimator.t == 30
    deployment.selector = BestWorstPairs()
    assert deployment.choose(features_GD) == (1, 0)
