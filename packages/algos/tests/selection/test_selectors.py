"""Pair selectors against the tables of the specification, and against enumeration where a formula decides."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations
from typing import Any

import pytest
import torch

from rlhf_algos.selection.candidates import Candidates, collapse_duplicates, label_pair
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import UsageError
from rlhf_core.plugins.registry import default_registry
from rlhf_core.testing.batches import make_batch

RELEASED = [  # arXiv 2502.07193's code: rewards, then the pairs of best_worst, best_second and best_quartile
    ([1, 5, 5, 0, 0], (1, 3), (1, 2), (1, 3)),
    ([2, 2, 2, 2], None, (0, 1), (0, 3)),
    ([3, 1, 2], (0, 1), (0, 2), None),
    ([0.1, 0.9], (1, 0), (1, 0), None),
    ([7, 7, 1, 7, 0], (0, 4), (0, 1), (0, 2)),
    ([5, 4, 3, 2, 1, 0], (0, 5), (0, 1), (0, 3)),
]
RLHFLOW = [  # RLHFlow's code: rewards, then (chosen, rejected, margin) of random, max_random, max_min and max_max
    ([1, 5, 5, 0], (1, 0, 4), (1, 0, 4), (1, 3, 5), None),
    ([2, 2, 2, 2], None, None, None, None),
    ([4, 1, 9, 9], (0, 1, 3), (2, 0, 5), (2, 1, 8), None),
    ([0, 0, 3, 1], None, (2, 0, 3), (2, 0, 3), (2, 3, 2)),
]
UNCERTAIN = ("drts", "delta_ucb", "optimistic", "max_uncertainty")


def selector(name: str, **options: object) -> Any:
    return default_registry().resolve("advantage", name)(**options)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_covariance(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size


@pytest.mark.parametrize("row", RELEASED, ids=str)
def test_the_released_strategies_choose_the_pairs_of_the_table(row: Any) -> None:
    rewards, *pairs = row
    for name, pair in zip(("best_worst", "best_second", "best_quartile"), pairs, strict=True):
        assert selector(name).choose(Candidates(tensor(rewards))) == pair, name
        assert selector(name, keep_ties=True).pair(tensor(rewards)) == pair, name


@pytest.mark.parametrize("row", RLHFLOW, ids=str)
def test_rlhflow_s_strategies_choose_orient_and_drop_as_in_the_table(row: Any) -> None:
    rewards, *pairs = row
    for name, pair in zip(("first_two", "max_random", "max_min", "max_max"), pairs, strict=True):
        found = selector(name).pair(tensor(rewards))
        assert found == (None if pair is None else pair[:2]), name
        if pair is not None:
            assert rewards[found[0]] - rewards[found[1]] == pair[2]


def test_the_oracle_labels_the_pair_that_the_reward_model_chose() -> None:
    rewards_G, oracle_G = tensor([0.1, 0.9, 0.5, -1]), tensor([2, -1, 0, 1])
    expected = {"best_worst": (3, 1), "best_second": (2, 1), "best_quartile": (3, 1)}
    for name, pair in expected.items():
        chosen = selector(name).choose(Candidates(rewards_G))
        assert label_pair(chosen, oracle_G) == pair
    assert label_pair((2, 0), tensor([1, 0, 1])) == (2, 0), "equal scores keep the order"


def test_of_duplicate_texts_the_last_reward_wins() -> None:
    rewards_G = collapse_duplicates(["a", "a", "b", "c"], tensor([3, 1, 2, 0]))
    assert rewards_G.tolist() == [1, 1, 2, 0]
    assert selector("best_worst").pair(rewards_G) == (2, 3)


@pytest.mark.parametrize("name", ["delta_ucb", "optimistic", "max_uncertainty"])
@pytest.mark.parametrize("seed", range(5))
def test_a_selector_with_a_formula_finds_the_maximum_of_all_pairs(name: str, seed: int) -> None:
    size, beta = 6, 0.7
    rewards = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    covariance_GG = random_covariance(size, seed)

    def std(i: int, j: int) -> float:
        return math.sqrt(float(covariance_GG[i, i] + covariance_GG[j, j] - 2 * covariance_GG[i, j]))

    best = max(range(size), key=rewards.__getitem__)
    values = {
        "delta_ucb": lambda i, j: rewards[i] - rewards[j] + beta * std(i, j),
        "optimistic": lambda i, j: (i == best, rewards[j] + 2 * beta * std(i, j)),
        "max_uncertainty": std,
    }
    wanted = max(permutations(range(size), 2), key=lambda pair: values[name](*pair))
    options = {} if name == "max_uncertainty" else {"beta": beta}
    found = selector(name, **options).choose(Candidates(tensor(rewards), covariance_GG))
    assert found is None or set(found) == set(wanted)
    assert found == wanted or name != "delta_ucb"
    if name == "optimistic":  # without a pair, no other completion is as promising as the best one
        assert (found is None) == (rewards[best] >= values[name](*wanted)[1])


def test_uncertainty_changes_the_choice() -> None:
    """The third completion is a little worse than the second, and hardly known."""
    rewards_G, covariance_GG = tensor([1, 0.9, 0.8]), torch.diag(tensor([0.01, 0.01, 4]))
    assert selector("optimistic").choose(Candidates(rewards_G, covariance_GG)) == (0, 2)
    assert selector("optimistic", beta=0.0).choose(Candidates(rewards_G, covariance_GG)) is None
    assert selector("delta_ucb", beta=0.0).choose(Candidates(rewards_G, covariance_GG)) == (0, 2)
    assert selector("delta_ucb").choose(Candidates(rewards_G, covariance_GG)) == (0, 2)
    near_G, small_GG = tensor([1, 0.8]), torch.diag(tensor([0, 0.02]))  # 2 beta std is 0.283 beta, the gap 0.2
    assert selector("optimistic", beta=0.72).choose(Candidates(near_G, small_GG)) == (0, 1)
    assert selector("optimistic", beta=0.70).choose(Candidates(near_G, small_GG)) is None
    shared_GG = torch.full((3, 3), 9.0, dtype=torch.float64)  # what all share, no comparison can tell
    assert selector("optimistic").choose(Candidates(rewards_G, shared_GG)) is None


def test_a_posterior_sample_has_the_mean_and_the_covariance_of_the_rewards() -> None:
    rewards_G, covariance_GG = tensor([1, -1, 0.5]), random_covariance(3, 1)
    candidates = Candidates(rewards_G, covariance_GG, torch.Generator().manual_seed(0))
    draws_KG = torch.stack([candidates.draw("test") for _ in range(20_000)])
    torch.testing.assert_close(draws_KG.mean(0), rewards_G, atol=0.03, rtol=0)
    torch.testing.assert_close(draws_KG.T.cov(), covariance_GG, atol=0.05, rtol=0)


def test_drts_pairs_a_likely_best_with_a_likely_worst() -> None:
    """Without uncertainty it is best_worst; of two candidates, the chance that one is best is known in closed form."""
    rewards_G, sure_GG = tensor([0.2, 3, -1, 1]), torch.zeros(4, 4, dtype=torch.float64)
    assert selector("drts").choose(Candidates(rewards_G, sure_GG)) == (1, 2)
    two_G, covariance_GG = tensor([0.5, 0.0]), torch.diag(tensor([0.5, 0.5]))
    first = [selector("drts", keep_ties=True).pair(two_G, k, covariance_GG=covariance_GG) for k in range(50)]
    assert set(first) == {(0, 1)}, "the reward labels the pair"
    chosen = Counter(
        selector("drts").choose(Candidates(two_G, covariance_GG, torch.Generator().manual_seed(k))) for k in range(4000)
    )
    likely = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))  # P(first > second), the difference being normal with variance 1
    assert chosen[0, 1] / 4000 == pytest.approx(likely, abs=0.025)
    assert chosen[0, 1] + chosen[1, 0] == 4000
    three_G, loose_GG = tensor([5, 0, 0.1]), torch.diag(tensor([0, 1, 1]))  # the best is known, the worst is not
    second = Counter(
        selector("drts").choose(Candidates(three_G, loose_GG, torch.Generator().manual_seed(k)))[1] for k in range(4000)
    )
    assert second[1] / 4000 == pytest.approx(0.5 * (1 + math.erf(0.1 / 2)), abs=0.025)  # P(N(0.1, 2) > 0)


def test_a_random_pair_is_uniform_and_depends_on_seed_prompt_and_step() -> None:
    rewards_G = tensor([3, 1, 2])
    found = Counter(selector("random_pair").pair(rewards_G, uid, 1) for uid in range(3000))
    assert set(found) == {(0, 1), (0, 2), (2, 1)}, "each is labeled by the reward"
    assert all(abs(count / 3000 - 1 / 3) < 0.03 for count in found.values())
    draws = {
        key: [selector("random_pair", seed=key[0]).pair(rewards_G, uid, key[1]) for uid in range(20)]
        for key in ((0, 1), (0, 2), (1, 1))
    }
    assert draws[0, 1] == [selector("random_pair").pair(rewards_G, uid, 1) for uid in range(20)]
    assert draws[0, 1] != draws[0, 2]
    assert draws[0, 1] != draws[1, 1]


def test_as_credit_a_pair_is_two_rows_chosen_first_and_the_regret_counts_both() -> None:
    rollouts = make_batch([2, 1, 3, 1, 2, 2], groups=[4, 4, 4, 9, 9, 9])
    rewards = RewardOutput(torch.tensor([0.0, 2.0, 1.0, 5.0, 5.0, 5.0]))
    credit = selector("best_second")(rewards, rollouts, {})
    assert credit.rows.tolist() == [1, 2], "a tie is left out"
    assert credit.advantages_NT[:, 0].tolist() == [0, 1, -1, 0, 0, 0]
    assert float(credit.metrics["pairs/share"].total / credit.metrics["pairs/share"].count) == 0.5
    assert float(credit.metrics["pairs/regret"].total) == pytest.approx(2.0 - 1.5)
    kept = selector("best_second", keep_ties=True)(rewards, rollouts, {})
    assert kept.rows.tolist() == [1, 2, 3, 4]
    assert selector("best_second", min_gap=1.0)(rewards, rollouts, {}).rows.tolist() == []


def test_as_credit_an_uncertain_selector_reads_the_reward_s_metric() -> None:
    rollouts = make_batch([1] * 3, groups=[0] * 3)
    rewards = RewardOutput(torch.tensor([1.0, 0.9, 0.8]), metrics={"uncertainty": torch.tensor([0.1, 0.1, 2.0])})
    assert selector("optimistic")(rewards, rollouts, {}).rows.tolist() == [0, 2]
    for name in UNCERTAIN:
        with pytest.raises(UsageError, match="needs the uncertainty of each reward, but this reward reports none"):
            selector(name)(RewardOutput(torch.tensor([1.0, 0.9, 0.8])), rollouts, {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("best_worst", {"min_gap": -1.0}, "min_gap must be in"),
        ("best_quartile", {"rank": 1}, "rank must be in"),
        ("optimistic", {"beta": math.nan}, "beta must be in"),
        ("delta_ucb", {"beta": -1.0}, "beta must be in"),
        ("drts", {"draws": 0}, "draws must be in"),
    ],
)
def test_options_outside_their_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        selector(name, **options)


def test_one_completion_per_prompt_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"the advantage \(BestSecondPairs\) compares the completions of each prompt"):
        selector("best_second")(RewardOutput(torch.ones(2)), make_batch([1, 1], groups=[0, 1]), {})
