"""A rollout that answers a step late, planted: ratios, clipping and staleness are those of the policy that sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, hookimpl, make_config
from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.roles import Role
from rlhf_core.rollout.hf import HuggingFaceRollout

WAITING: list[Rollouts] = []


@dataclass(frozen=True)
class Late(HuggingFaceRollout):
    """Samples these prompts and returns the completions of the step before."""

    exact = False  # so that the rule for other engines is what decides

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        WAITING.append(super().__call__(role, prompts, sampling))
        return WAITING.pop(0) if len(WAITING) > 1 else WAITING[0]


class Recorder:
    """Computes log-probabilities of the batch at hand just before the actor's update, and keeps what was measured."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.rows: list[tuple[Any, torch.Tensor, Mapping[str, Any]]] = []

    @hookimpl
    def rlhf_rollouts_ready(self, run: Any, source: str, rollouts: Any, rewards: Any) -> None:
        self.batch = rollouts

    @hookimpl
    def rlhf_before_update(self, run: Any, role: str) -> None:
        self.now_NT = run.roles["actor"].infer(self.batch, frozenset({"logprobs_NT"}))["logprobs_NT"].double()

    @hookimpl
    def rlhf_step_end(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
        self.rows.append((run.samples["actor"], self.now_NT, metrics))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_late_batch_is_trained_with_the_ratio_of_the_policy_that_sampled_it(tmp_path: Path, minibatches: int) -> None:
    WAITING.clear()
    recorder = Recorder()
    config = make_config(
        "dr_grpo",
        model="tiny",
        reward="length",
        rollout=Late(),
        batch_size=4,
        steps=3,
        minibatches=minibatches,
        sampling={"n": 4, "max_new_tokens": 8},
        actor={"optim": {"lr": 3e-2}},
        output=str(tmp_path / "run"),
    )
    run = Run(config)
    run.registry.register(recorder, "recorder")
    run.train()
    for step, (batch, now_NT, metrics) in enumerate(recorder.rows, start=1):
        age = 0 if step == 1 else minibatches
        assert metrics["rollout/staleness"] == metrics["rollout/staleness_max"] == age
        assert batch.version == max(0, (step - 2) * minibatches)
        mask_NT = batch.mask_NT
        torch.testing.assert_close(
            batch["old_logprobs_NT"], batch["sampler_logprobs_NT"], atol=1e-4, rtol=0
        ) if age else None
        ratio = (now_NT - batch["sampler_logprobs_NT"].double())[mask_NT].exp()
        if minibatches == 1:
            assert metrics["actor/ratio"] == pytest.approx(float(ratio.mean()), rel=1e-4)
            advantages = batch["advantages_NT"][mask_NT]
            low, high = config.providers["loss"].clip_low, config.providers["loss"].clip_high
            clipped = ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
            assert metrics["actor/clip_fraction"] == pytest.approx(float(clipped.double().mean()), abs=1e-6)
            assert ("actor/mismatch" in metrics) == (step == 1), "late tokens say nothing of the engine's agreement"
    assert abs(recorder.rows[2][2]["actor/ratio"] - 1) > 1e-3, "the planted lateness shows"
