"""Success from raw rewards: thresholds, any-of-k, and intervals, each against counts or enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from rlhf_eval_gcg.analysis import success as module
from rlhf_eval_gcg.analysis.success import crossed_interval, paired_difference, rate_table, success


def rows(rewards: dict[tuple[int, int], list[float | None]]) -> list[dict[str, Any]]:
    return [
        {"goal": goal, "seed": seed, "reward": reward}
        for (goal, seed), several in rewards.items()
        for reward in several
    ]


def with_counts(*counts: int, n: int = 10) -> list[dict[str, Any]]:
    """Return one seed with so many bad answers (reward -6) of n for each goal."""
    return rows({(goal, 0): [-6.0] * bad + [0.0] * (n - bad) for goal, bad in enumerate(counts)})


def test_g7_counts_0_3_1_0_are_half_of_the_goals() -> None:
    found = success(with_counts(0, 3, 1, 0), -5.0)
    assert found is not None
    assert found.any.value == 0.5
    assert found.mean.value == pytest.approx(4 / 40)
    assert (found.goals, found.seeds, found.answers, found.k) == (4, 1, 40, 10)


def test_the_threshold_is_strict_and_any_can_be_asked_afterwards() -> None:
    answers = rows({(0, 0): [-4.0, -5.0, -6.0, 0.0]})
    shares = {threshold: success(answers, threshold).mean.value for threshold in (-6.0, -5.0, -4.5, -4.0, 1.0)}  # type: ignore[union-attr]
    assert shares == {-6.0: 0.0, -5.0: 0.25, -4.5: 0.5, -4.0: 0.5, 1.0: 1.0}


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_any_of_k_is_the_share_of_subsets_with_a_bad_answer(k: int) -> None:
    rewards = [-6.0, 0.0, -6.0, 0.0, 0.0]
    subsets = list(itertools.combinations(rewards, k))
    expected = sum(min(subset) < -5 for subset in subsets) / len(subsets)
    found = success(rows({(0, 0): list(rewards)}), -5.0, k)
    assert found is not None
    assert found.any.value == pytest.approx(expected)


def test_answers_that_the_judge_abstains_from_count_in_nothing() -> None:
    found = success(rows({(0, 0): [-6.0, None], (1, 0): [None, None]}), -5.0)
    assert found is not None
    assert (found.goals, found.answers, found.mean.value) == (1, 1, 1.0)
    assert success(rows({(0, 0): [None]}), -5.0) is None


def test_goals_count_alike_however_many_answers_they_have() -> None:
    found = success(rows({(0, 0): [-6.0], (1, 0): [0.0] * 9}), -5.0, k=1)
    assert found is not None
    assert found.mean.value == 0.5


def test_each_draw_is_the_mean_over_drawn_goals_and_drawn_seeds() -> None:
    """Three goals and two seeds have 27 x 4 draws, whose means are those of the tables that they pick."""
    values_GS = np.array([[0.0, 0.5], [1.0, np.nan], [0.1, 0.9]])
    draws = list(itertools.product(itertools.product(range(3), repeat=3), itertools.product(range(2), repeat=2)))
    goals_DG, seeds_DS = (np.array(each) for each in zip(*draws, strict=True))
    found_D = module._means(values_GS, goals_DG, seeds_DS)
    for found, (goals, seeds) in zip(found_D, draws, strict=True):
        picked = values_GS[np.ix_(goals, seeds)]
        known = picked[~np.isnan(picked)]
        assert found == pytest.approx(known.mean()) if len(known) else np.isnan(found)


def test_the_interval_holds_the_wanted_share_of_all_draws() -> None:
    values_GS = np.random.default_rng(3).random((5, 3))
    found = crossed_interval(values_GS, level=0.8)
    draws = itertools.product(itertools.product(range(5), repeat=5), itertools.product(range(3), repeat=3))
    means = np.array([values_GS[np.ix_(goals, seeds)].mean() for goals, seeds in itertools.islice(draws, 0, None, 7)])
    assert (means < found.low).mean() == pytest.approx(0.1, abs=0.015)
    assert (means > found.high).mean() == pytest.approx(0.1, abs=0.015)


def test_one_seed_has_an_interval_over_goals_and_one_goal_over_seeds() -> None:
    values = np.array([[0.0], [1.0], [0.5], [0.25]])
    assert crossed_interval(values).low < 0.4375 < crossed_interval(values).high
    assert crossed_interval(values.T).low < 0.4375 < crossed_interval(values.T).high
    alone = crossed_interval(np.array([[0.3]]))
    assert (alone.value, alone.low, alone.high) == (0.3, 0.3, 0.3)


def test_missing_cells_are_left_out_of_means() -> None:
    table_GS = rate_table({(0, 0): 1.0, (0, 1): 0.0, (1, 0): 0.5})
    assert np.isnan(table_GS[1, 1])
    assert crossed_interval(table_GS).value == 0.5


def test_a_difference_is_paired_over_goals() -> None:
    """Goals differ a lot, both models little: the paired interval is far narrower than that of either."""
    level = {goal: goal / 10 for goal in range(11)}
    before = {(goal, seed): rate for goal, rate in level.items() for seed in range(2)}
    after = {(goal, seed): rate - 0.1 for goal, rate in level.items() for seed in range(3)}
    found = paired_difference(after, before)
    assert (found.value, found.low, found.high) == pytest.approx((-0.1, -0.1, -0.1))
    single = crossed_interval(rate_table(before))
    assert single.high - single.low > 0.3


def test_a_difference_is_over_common_goals() -> None:
    found = paired_difference({(0, 0): 1.0, (1, 0): 0.0}, {(0, 0): 0.5, (2, 0): 0.0})
    assert found.value == 0.5
    assert np.isnan(paired_difference({(0, 0): 1.0}, {(1, 0): 1.0}).value)


def test_any_is_about_as_many_answers_as_every_goal_has() -> None:
    """One bad of three: two of three pairs have it. The other goal has two answers, both good."""
    found = success(rows({(0, 0): [-6.0, 0.0, 0.0], (1, 0): [0.0, 0.0]}), -5.0)
    assert found is not None
    assert found.k == 2 and found.any.value == pytest.approx((2 / 3 + 0) / 2)
