"""Samples from which the reward abstains: the others have the credit of a group without them, in whole runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.providers import Reward

MODEL = "tiny:hidden=16,layers=1"


@dataclass(frozen=True)
class Partial(Reward):
    """A number that the first tokens give; the reward abstains from the first `missing` completions of each prompt."""

    missing: int = 1

    def __call__(self, rollouts: Rollouts) -> list[float | None]:
        groups = rollouts.group_N.tolist()
        place = [groups[:i].count(group) for i, group in enumerate(groups)]
        return [None if k < self.missing else score(rollouts, i) for i, k in enumerate(place)]


def score(rollouts: Any, i: int) -> float:
    """The reward of a completion that has one."""
    return float((rollouts.tokens_NT[i, 0] * 7 + rollouts.lengths_N[i]) % 11)


def trained(output: Path, algorithm: str, missing: int = 1) -> tuple[Any, dict[str, Any]]:
    """Return the rows that a step trains on, and its metrics."""
    usual: dict[str, Any] = {
        "model": MODEL,
        "reward": Partial(missing),
        "batch_size": 3,
        "steps": 1,
        "minibatches": 1,
        "sampling": {"n": 4, "max_new_tokens": 5},
    }
    run = Run(make_config(algorithm, output=str(output), **usual))
    metrics = dict(run.train().metrics)
    return run.samples["actor"], metrics


def by_group(batch: Any) -> list[list[int]]:
    """The rows of each group."""
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(batch.group_N.tolist()):
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def first_of(batch: Any) -> list[float]:
    """The advantage of each row's first token."""
    values: list[float] = batch["advantages_NT"][:, 0].tolist()
    return values


def test_grpo_compares_with_those_that_have_a_reward(tmp_path: Path) -> None:
    batch, metrics = trained(tmp_path, "grpo")
    assert [len(rows) for rows in by_group(batch)] == [3, 3, 3] and metrics["reward/abstained"] == 0.25
    for rows in by_group(batch):
        scores = [score(batch, i) for i in rows]
        mean, deviation = statistics.fmean(scores), statistics.stdev(scores)
        expected = [(each - mean) / deviation if deviation else 0.0 for each in scores]
        assert [first_of(batch)[i] for i in rows] == pytest.approx(expected, abs=1e-5)
    assert any(first_of(batch))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_rloo_has_the_others_for_a_baseline_and_no_credit_alone(tmp_path: Path, missing: int) -> None:
    """With three of four missing, each group is one completion without a baseline: no credit, and no error."""
    batch, _ = trained(tmp_path, "rloo", missing)
    for rows in by_group(batch):
        assert len(rows) == 4 - missing
        scores = [score(batch, i) for i in rows]
        others = [[*scores[:k], *scores[k + 1 :]] for k in range(len(scores))]
        expected = [own - statistics.fmean(rest) if rest else 0.0 for own, rest in zip(scores, others, strict=True)]
        assert [first_of(batch)[i] for i in rows] == pytest.approx(expected, abs=1e-5)


def test_reinforce_pp_whitens_over_those_that_have_a_reward(tmp_path: Path) -> None:
    """Step 1 is at the reference, so the KL penalty is 0 and every token returns its completion's reward."""
    batch, _ = trained(tmp_path, "reinforce_pp")
    assert len(batch) == 9
    returns = [score(batch, i) for i in range(9) for _ in range(int(batch.mask_NT[i].sum()))]
    expected = [(each - statistics.fmean(returns)) / statistics.pstdev(returns) for each in returns]
    assert batch["advantages_NT"][batch.mask_NT].tolist() == pytest.approx(expected, abs=1e-4)


def test_ppo_whitens_its_advantages_without_them(tmp_path: Path) -> None:
    """Generalised advantages of each completion by hand, from the critic's own values (gamma 1, lambda 0.95)."""
    batch, metrics = trained(tmp_path, "ppo")
    raw = []
    for i in range(len(batch)):
        values = batch["values_NT"][i][batch.mask_NT[i]].double().tolist()
        rewards = [0.0] * (len(values) - 1) + [score(batch, i)]
        after, found = 0.0, []
        for t in reversed(range(len(values))):
            ahead = values[t + 1] if t + 1 < len(values) else 0.0
            after = rewards[t] + ahead - values[t] + 0.95 * after
            found.append(after)
        raw += found[::-1]
    expected = [(each - statistics.fmean(raw)) / statistics.pstdev(raw) for each in raw]
    assert len(batch) == 9 and metrics["reward/abstained"] == 0.25
    assert batch["advantages_NT"][batch.mask_NT].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("algorithm", ["online_dpo", "rejection_sampling", "repulse"])
@pytest.mark.parametrize("missing", [1, 3, 4])
def test_other_algorithms_train_on_what_is_left(tmp_path: Path, algorithm: str, missing: int) -> None:
    """Pairs and best completions are among those with a reward; where one or none is left, there may be nothing to train on."""
    batch, metrics = trained(tmp_path, algorithm, missing)
    assert metrics["reward/abstained"] == missing / 4
    if missing == 4:
        assert metrics["skipped/actor"] >= 1
    elif algorithm == "online_dpo":
        assert len(batch) <= (6 if missing == 1 else 0)
        for best, worst in zip(range(0, len(batch), 2), range(1, len(batch), 2), strict=True):
            assert score(batch, best) > score(batch, worst)
    else:
        assert not bool(batch["abstained_N"].any())
