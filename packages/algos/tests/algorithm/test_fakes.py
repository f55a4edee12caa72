"""Whole runs on the rollout `fake` and the strategy `fake`: no model, so that every number can be worked out by hand.

The policy is one number w: the log-probability of a token is a constant plus w, the reference's w stays 0. Hence the
log-ratio to the reference is w at every token, and on policy the gradient of the objective is minus the mean advantage
over tokens. Both penalties, all three estimators and the adaptive coefficient follow in three lines of plain Python.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Registry, Run, hookimpl, make_config
from rlhf_core.cli import main

LR, COEF, STEPS, N = 0.5, 0.3, 6, 4

VALUE: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}
SLOPE: dict[str, Callable[[float], float]] = {"k1": lambda d: 1.0, "k2": lambda d: d, "k3": lambda d: 1 - math.exp(-d)}


class Watch:
    """The lengths of each step's completions, prompt by prompt, and the number after it."""

    def __init__(self, last: int = STEPS) -> None:
        self.last = last
        self.lengths: list[list[list[int]]] = []
        self.w: list[float] = []

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> bool:
        (batch,) = run.samples.values()
        flat = [int(length) for length in batch.lengths_N]
        self.lengths.append([flat[i : i + N] for i in range(0, len(flat), N)])
        self.w.append(float(run.roles["actor"].trainable.w.detach()))  # type: ignore[attr-defined]
        return step == self.last


def watched(output: Path, kl: dict[str, Any], last: int = STEPS, **options: Any) -> Watch:
    """GRPO's run on the two fakes, with credit and loss whose gradient on one number is not zero."""
    registry, watch = Registry(), Watch(last)
    registry.register(watch, name="watch")
    config = make_config(
        {"use": "grpo", "kl": kl},
        model="tiny",
        rollout="fake",
        strategy="fake",
        advantage="rloo",
        loss="dapo",
        reward={"use": "length", "target": 4},
        sampling={"n": N, "max_new_tokens": 12},
        actor={"optim": {"lr": LR}},
        batch_size=4,
        steps=STEPS,
        output=str(output),
        **options,
    )
    Run(config, registry).train()
    return watch


def metrics(output: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def by_hand(watch: Watch, estimator: str, where: str, coefs: list[float]) -> list[float]:
    """w after every step, from the definitions, in float64."""
    w, history = 0.0, []
    for groups, coef in zip(watch.lengths, coefs, strict=True):
        gradient = coef * SLOPE[estimator](w) if where == "loss" else 0.0
        tokens = sum(map(sum, groups))
        for lengths in groups:
            penalty = coef * VALUE[estimator](w) if where == "reward" else 0.0
            rewards = [-abs(length - 4) / 4 - penalty * length for length in lengths]
            for reward, length in zip(rewards, lengths, strict=True):
                gradient -= (reward - (sum(rewards) - reward) / (N - 1)) * length / tokens
        w -= LR * gradient
        history.append(w)
    return history


@pytest.mark.parametrize("where", ["reward", "loss"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_penalty_moves_the_policy_as_its_definition_says(estimator: str, where: str, tmp_path: Path) -> None:
    watch = watched(tmp_path / "run", {"coef": COEF, "estimator": estimator, "where": where})
    expected = by_hand(watch, estimator, where, [COEF] * STEPS)
    assert watch.w == pytest.approx(expected, rel=1e-4)
    assert min(map(abs, expected)) > 0.05, "it moves, or equality would say little"
    before = [0.0, *expected[:-1]]  # the penalty is logged as of the policy that sampled
    assert metrics(tmp_path / "run", "kl/mean") == pytest.approx([VALUE[estimator](w) for w in before], abs=1e-5)
    assert metrics(tmp_path / "run", "kl/coef") == [COEF] * STEPS


def adaptive(watch: Watch, kl_mean: list[float], target: float, horizon: int) -> list[float]:
    """The coefficients in force by Ziegler et al.'s rule, from each step's mean KL per token."""
    coefs = [COEF]
    for groups, kl in zip(watch.lengths, kl_mean, strict=True):
        per_completion = kl * sum(map(sum, groups)) / (len(groups) * N)
        error = min(max(per_completion / target - 1, -0.2), 0.2)
        coefs.append(coefs[-1] * (1 + error * len(groups) * N / horizon))
    return coefs[:-1]


ADAPTIVE = {"coef": COEF, "estimator": "k2", "where": "loss", "target": 0.1, "horizon": 50}


def test_an_adaptive_coefficient_follows_the_kl_and_is_what_trains(tmp_path: Path) -> None:
    watch = watched(tmp_path / "run", ADAPTIVE)
    coefs = adaptive(watch, metrics(tmp_path / "run", "kl/mean"), target=0.1, horizon=50)
    assert metrics(tmp_path / "run", "kl/coef") == pytest.approx(coefs, rel=1e-6)
    assert coefs[1] < COEF < coefs[-1], "too near at first, too far later"
    assert watch.w == pytest.approx(by_hand(watch, "k2", "loss", coefs), rel=1e-4)


def test_a_resumed_run_goes_on_with_the_coefficient_and_the_number_it_had(tmp_path: Path) -> None:
    straight = watched(tmp_path / "straight", ADAPTIVE)
    watched(tmp_path / "run", ADAPTIVE, last=3)
    resumed = watched(tmp_path / "run", ADAPTIVE, resume=True)
    assert resumed.w == straight.w[3:]
    for name in ("kl/coef", "kl/mean", "reward/mean"):
        assert metrics(tmp_path / "run", name) == metrics(tmp_path / "straight", name)


def test_the_command_runs_grpo_on_the_two_fakes_and_logs_the_fixed_names(tmp_path: Path) -> None:
    words = "grpo --model tiny --rollout fake --strategy fake --reward length --steps 2 --batch-size 2 --seed 3"
    assert main([*words.split(), "--output", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    phases = {f"time/{phase}" for phase in ("rollout", "reward", "needs", "credit", "train", "sync", "step")}
    for row in rows:
        assert {"reward/mean", "kl/mean", "loss/actor", "tokens", *phases} <= row.keys()
        assert row["time/step"] >= sum(row[phase] for phase in phases - {"time/step"})
    assert json.loads((tmp_path / "run" / "model" / "fake.json").read_text())["steps_done"] == 2
