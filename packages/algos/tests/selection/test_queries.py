"""Active-set scores against their formulas, and what is asked of a batch."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_algos.one_pass import Dense, Omd
from rlhf_algos.selection.queries import SCORES, Queries, top_share

MARGINS = torch.tensor([0.5, -3.0, 0.9, -1.2, 0.0], dtype=torch.float64)
Z_BD = torch.tensor([[1.0, 0], [0, 2], [1, 1], [-3, 0], [0.5, -0.5]], dtype=torch.float64)


def scores(by: str, margins_B: torch.Tensor = MARGINS, z_BD: torch.Tensor = Z_BD, seed: int = 0) -> torch.Tensor:
    curvature = Dense(torch.tensor([[0.5, 0.1], [0.1, 0.25]], dtype=torch.float64))
    return Queries(margins_B, z_BD, curvature, torch.Generator().manual_seed(seed)).scores(by)


def test_each_score_is_its_formula() -> None:
    assert scores("reward_diff").tolist() == [0.5, 3.0, 0.9, 1.2, 0.0]
    assert scores("margin").tolist() == pytest.approx([-0.5, -2.0, -0.1, -0.2, -1.0])
    assert scores("closest").tolist() == [-0.5, -3.0, -0.9, -1.2, 0.0]
    assert scores("distance").tolist() == [1.0, 4.0, 2.0, 9.0, 0.5]
    by_hand = [0.5, 0.25 * 4, 0.5 + 0.25 + 0.2, 0.5 * 9, 0.25 * (0.5 + 0.25 - 0.2)]
    assert scores("uncertainty").tolist() == pytest.approx([math.sqrt(value) for value in by_hand])
    optimistic = [abs(float(margin)) + math.sqrt(value) for margin, value in zip(MARGINS, by_hand, strict=True)]
    assert scores("delta_ucb").tolist() == pytest.approx(optimistic)


def test_a_drawn_gap_has_the_distribution_of_the_posterior() -> None:
    """Moments of |N(m, s^2)| in closed form: E|x|^2 = m^2 + s^2, and E|x| of the folded normal distribution."""
    many_B = torch.full((200_000,), -0.7, dtype=torch.float64)
    z_BD = torch.tensor([[0.0, 2.0]], dtype=torch.float64).expand(len(many_B), 2)  # a standard deviation of 1
    drawn_B = scores("drts", many_B, z_BD)
    assert float(drawn_B.square().mean()) == pytest.approx(0.49 + 1, abs=0.02)
    folded = math.sqrt(2 / math.pi) * math.exp(-0.49 / 2) + 0.7 * math.erf(0.7 / math.sqrt(2))
    assert float(drawn_B.mean()) == pytest.approx(folded, abs=0.01)
    assert not torch.equal(scores("drts"), scores("drts", seed=1))


@pytest.mark.parametrize("by", sorted(SCORES))
def test_no_score_depends_on_which_of_the_two_comes_first(by: str) -> None:
    torch.testing.assert_close(scores(by), scores(by, -MARGINS, -Z_BD))


def test_the_curvature_of_asked_pairs_lowers_the_score_of_their_like() -> None:
    estimator = Omd(2)
    before = Queries(MARGINS, Z_BD, estimator.curvature, torch.Generator()).scores("uncertainty")
    estimator.step(Z_BD[:1].repeat(20, 1))
    after = Queries(MARGINS, Z_BD, estimator.curvature, torch.Generator()).scores("uncertainty")
    assert after[0] < 0.6 * before[0]
    assert float(after[1]) == pytest.approx(float(before[1])), "an orthogonal pair is as unknown as before"
    inverse_DD = torch.linalg.inv(estimator.curvature.matrix_DD)
    assert after.tolist() == pytest.approx([math.sqrt(float(z @ inverse_DD @ z)) for z in Z_BD])


def test_random_scores_depend_on_the_seed_alone() -> None:
    assert torch.equal(scores("random"), scores("random", MARGINS + 1))
    assert not torch.equal(scores("random"), scores("random", seed=1))


def test_the_top_share_is_asked_in_the_order_of_the_batch() -> None:
    values = torch.tensor([1.0, 5, 2, 5, 3, 0, 0, 0, 0, 4])
    assert top_share(values, 0.25).tolist() == [1, 3]
    assert top_share(values, 0.3).tolist() == [1, 3, 9]
    assert len(top_share(torch.arange(100.0), 0.29)) == 29, "0.29 * 100 is a little below 29"
    assert top_share(values, 0.01).tolist() == [1], "at least one, of equal scores the earlier"
    assert top_share(values, 1.0).tolist() == list(range(10))
    assert top_share(values[:0], 0.5).tolist() == []
