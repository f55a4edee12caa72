"""The pessimistic reward: its limits, its order, and the normal distribution by numerical integration."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_algos.selection.pessimism import exploration_bonus, pessimistic_draws, pessimistic_normal

DRAWS_KN = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def test_the_limits_are_the_mean_the_worst_case_and_the_variance_penalty() -> None:
    mean_N, variance_N = DRAWS_KN.mean(0), DRAWS_KN.var(0, unbiased=False)
    torch.testing.assert_close(pessimistic_draws(DRAWS_KN, 1e9), mean_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pessimistic_draws(DRAWS_KN, 1e-4), DRAWS_KN.amin(0), rtol=0, atol=1e-3)
    assert torch.equal(pessimistic_draws(DRAWS_KN, 0.0), DRAWS_KN.amin(0))
    assert torch.equal(pessimistic_draws(DRAWS_KN, math.inf), mean_N)
    for beta in (50.0, 500.0):  # the error of the second-order term falls with beta^2
        error_N = pessimistic_draws(DRAWS_KN, beta) - (mean_N - variance_N / (2 * beta))
        assert float(error_N.abs().max()) < 20 / beta**2


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0, 40.0])
def test_it_is_the_formula_and_rises_with_beta(beta: float) -> None:
    columns = DRAWS_KN.T.tolist()
    expected = [-beta * math.log(sum(math.exp(-r / beta) for r in column) / len(column)) for column in columns]
    assert pessimistic_draws(DRAWS_KN, beta).tolist() == pytest.approx(expected)
    assert bool((pessimistic_draws(DRAWS_KN, beta) < pessimistic_draws(DRAWS_KN, 1.1 * beta)).all())
    assert bool((pessimistic_draws(DRAWS_KN, beta) <= DRAWS_KN.mean(0)).all())


@pytest.mark.parametrize(("mean", "std", "beta"), [(0.3, 0.5, 1.0), (-1.0, 2.0, 4.0), (2.0, 0.0, 0.1)])
def test_of_a_normal_distribution_it_is_exact(mean: float, std: float, beta: float) -> None:
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    integral = torch.trapezoid(density * torch.exp(-(mean + std * grid) / beta), grid)
    found = pessimistic_normal(torch.tensor([mean]).double(), torch.tensor([std]).double(), beta)
    assert float(found) == pytest.approx(-beta * math.log(float(integral)), rel=1e-6)


def test_it_does_not_overflow() -> None:
    assert pessimistic_draws(torch.tensor([[1e4], [-1e4]], dtype=torch.float64), 0.01).tolist() == pytest.approx([-1e4])


def test_the_bonus_is_in_standard_deviations() -> None:
    assert exploration_bonus(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), 2.0).tolist() == [2.0, 2.0]
