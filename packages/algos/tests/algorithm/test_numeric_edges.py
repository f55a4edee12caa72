"""Edges of whole runs: rewards that are equal up to rounding, completions without a token, engines that are off a little, rows
that several roles share, and sampling that cuts the distribution."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.contract.roles import Role
from rlhf_core.rollout.hf import HuggingFaceRollout

MODEL = "tiny:hidden=32,layers=1"


@dataclass(frozen=True)
class Even(Reward):
    """The share of even tokens."""

    def __call__(self, rollouts: Rollouts) -> torch.Tensor:
        even_NT = (rollouts.tokens_NT % 2 == 0) & rollouts.mask_NT
        return even_NT.sum(1) / rollouts.lengths_N.clamp(min=1)


def steps_of(output: Path, algorithm: Any, **options: Any) -> list[Mapping[str, float]]:
    """The metrics of every step of a small run."""
    usual: dict[str, Any] = {
        "model": MODEL,
        "reward": Even(),
        "batch_size": 2,
        "minibatches": 1,
        "steps": 2,
        "sampling": {"n": 4, "max_new_tokens": 6},
        "actor": {"optim": {"lr": 1e-2}},
    }
    Run(make_config(algorithm, output=str(output), **usual | options)).train()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# noise is not credit
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noisy(Reward):
    """Reward that is equal for all completions up to `noise`, in float32 or bfloat16."""

    noise: float = 6e-8
    precision: float = 0.0

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        rewards_N = 0.5 + self.noise * torch.arange(len(rollouts)) / len(rollouts)
        return RewardOutput(rewards_N, precision=self.precision) if self.precision else RewardOutput(rewards_N)


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_pp"])
def test_rewards_that_are_equal_up_to_rounding_move_no_weight(algorithm: str, tmp_path: Path) -> None:
    off: Any = {"use": algorithm, "kl": {"coef": 0.0}}
    (step,) = steps_of(tmp_path / "float32", off, reward=Noisy(), steps=1)
    assert step["grad_norm/actor"] == 0.0
    (step,) = steps_of(tmp_path / "narrow", off, reward=Noisy(noise=4e-3, precision=8e-3), steps=1)
    assert step["grad_norm/actor"] == 0.0, "a reward says how precise it is"
    (step,) = steps_of(tmp_path / "real", off, reward=Noisy(noise=4e-3), steps=1)
    assert step["grad_norm/actor"] > 0, "a difference that is no rounding counts"


def test_the_cut_of_a_reward_model_s_batches_changes_no_result(tmp_path: Path) -> None:
    """Greedy completions of a prompt are the same text, which micro-batches of other shapes score up to rounding."""
    options: Any = {"sampling": {"n": 8, "max_new_tokens": 33, "temperature": 0.0}, "steps": 1}
    for dtype in ("float32", "bfloat16"):
        for tokens in (16384, 200):
            reward = {"use": "model", "model": "tiny", "dtype": dtype, "micro_tokens": tokens}
            output = tmp_path / f"{dtype}-{tokens}"
            (step,) = steps_of(output, {"use": "grpo", "kl": {"coef": 0.0}}, reward=reward, **options)
            assert (step["loss/actor"], step["grad_norm/actor"]) == (0.0, 0.0), (dtype, tokens)


# ----------------------------------------------------------------------------------------------------------------------
# empty completions
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Empty(HuggingFaceRollout):
    """Returns no token at all, as an engine that refuses every prompt."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rollouts = super().__call__(role, prompts, sampling)
        mask_NT = torch.zeros_like(rollouts.mask_NT[:, :0])
        extras = {name: each[:, :0] if name.endswith("_NT") else each for name, each in rollouts.extras.items()}
        return replace(
            rollouts,
            texts=[""] * len(rollouts),
            tokens_NT=rollouts.tokens_NT[:, :0],
            lengths_N=torch.zeros_like(rollouts.lengths_N),
            mask_NT=mask_NT,
            kept_sets=[],
            extras=extras,
        )


@pytest.mark.parametrize(
    ("algorithm", "top_p"), [("grpo", 0.8), ("ppo", 1.0), ("dapo", 1.0), ("online_dpo", 1.0), ("repulse", 1.0)]
)
def test_a_step_without_a_single_token_is_a_step_without_a_gradient(
    algorithm: str, top_p: float, tmp_path: Path
) -> None:
    options: Any = {"use": algorithm, "dynamic": {"keep": "all"}} if algorithm == "dapo" else algorithm
    sampling = {"n": 4, "max_new_tokens": 4, "top_p": top_p}
    for step in steps_of(tmp_path / "run", options, rollout=Empty(), sampling=sampling, steps=1):
        assert step.get("grad_norm/actor", 0.0) == 0.0  # no pair, no update
        assert step["completion/length"] == step["completion/entropy"] == 0.0
        assert all(value == value for value in step.values()), "no metric is nan"


# ----------------------------------------------------------------------------------------------------------------------
# the KL to the reference
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Off(HuggingFaceRollout):
    """An engine whose log-probabilities are a little off, as one that computes in bfloat16."""

    exact = False

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rollouts = super().__call__(role, prompts, sampling)
        off_NT = rollouts["sampler_logprobs_NT"] - 0.03 * rollouts.mask_NT
        return rollouts.with_extras(sampler_logprobs_NT=off_NT)


@pytest.mark.parametrize(
    ("cut", "where"),
    [
        ({}, "loss"),
        ({"top_p": 0.5}, "loss"),
        ({"top_k": 5}, "loss"),
        ({"top_k": 5}, "reward"),
        ({"min_p": 0.5}, "reward"),
    ],
)
def test_the_kl_of_a_policy_that_is_its_reference_is_zero(cut: dict[str, float], where: str, tmp_path: Path) -> None:
    """Check hf and an engine whose log-probabilities differ from the trainer's; training moves the KL away from 0."""
    for name, rollout in (("exact", HuggingFaceRollout()), ("off", Off())):
        kl: Any = {"coef": 0.04, "where": where, "estimator": "k3"}
        sampling = {"n": 4, "max_new_tokens": 6, **cut}
        first, second = steps_of(
            tmp_path / name, {"use": "grpo", "kl": kl}, rollout=rollout, sampling=sampling, max_mismatch=1.0
        )
        assert abs(first["kl/mean"]) < 1e-6 and abs(first["kl/completion"]) < 1e-5
        assert second["kl/mean"] > 1e-6
        if where == "loss":
            assert second["kl/mean"] == pytest.approx(second["actor/kl"], rel=1e-3)


def test_an_adaptive_coefficient_falls_while_the_policy_is_its_reference(tmp_path: Path) -> None:
    """KL far below the target: the coefficient shrinks by a fifth of n / horizon a step, under truncation as without."""
    kl = {"coef": 0.04, "where": "loss", "estimator": "k3", "target": 0.5, "horizon": 100}
    rows = steps_of(
        tmp_path / "run",
        {"use": "grpo", "kl": kl},
        sampling={"n": 4, "max_new_tokens": 6, "top_k": 5},
        actor={"optim": {"lr": 1e-6}},
        steps=3,
    )
    assert [row["kl/coef"] for row in rows] == pytest.approx([0.04 * (1 - 0.2 * 8 / 100) ** k for k in range(3)])


# ----------------------------------------------------------------------------------------------------------------------
# the temperature
# ----------------------------------------------------------------------------------------------------------------------


def test_every_role_takes_its_log_probabilities_at_the_temperature_of_sampling(tmp_path: Path) -> None:
    """The trainer's are the sampler's, and the KL of a policy that is its reference is 0: no role is at another one."""
    sampling = {"n": 4, "max_new_tokens": 6, "temperature": 0.7}
    (step,) = steps_of(tmp_path / "run", {"use": "grpo", "kl": {"coef": 0.04}}, sampling=sampling, steps=1)
    assert step["actor/mismatch_max"] < 1e-5
    assert abs(step["kl/mean"]) < 1e-6
    (other,) = steps_of(tmp_path / "other", "grpo", sampling=sampling | {"temperature": 1.0}, steps=1)
    assert other["completion/entropy"] > step["completion/entropy"] + 1e-3, "or equality would say little"


# ----------------------------------------------------------------------------------------------------------------------
# what is counted
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["repulse", "ppo", "grpo"])
def test_rows_that_several_credits_share_count_once(algorithm: str, tmp_path: Path) -> None:
    run = Run(
        make_config(
            algorithm,
            model=MODEL,
            reward="length",
            batch_size=2,
            minibatches=1,
            steps=1,
            sampling={"n": 4, "max_new_tokens": 6},
            output=str(tmp_path / "run"),
        )
    )
    run.train()
    by_source = {key.partition("#")[0]: batch for key, batch in run.samples.items()}
    tokens = sum(int((batch.prompt_lengths_N + batch.lengths_N).sum()) for batch in by_source.values())
    assert run.last_metrics["tokens"] == tokens
    assert len(by_source) == (2 if algorithm == "repulse" else 1)
    assert len(run.samples) == (3 if algorithm == "repulse" else 1), "the proposal's rows have two credits"


def test_a_dpo_run_begins_at_half_accuracy_however_its_roles_are_laid_out(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}", "chosen": "yes " * (1 + n % 5), "rejected": "no " * (1 + n % 7)} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for packing in (True, False):  # the reference packs its rows
        run = Run(
            make_config(
                "dpo",
                model=MODEL,
                data={"use": "json", "path": str(data)},
                batch_size=8,
                steps=1,
                actor={"packing": packing},
                output=str(tmp_path / f"run-{packing}"),
            )
        )
        run.train()
        assert run.last_metrics["actor/accuracy"] == 0.5
