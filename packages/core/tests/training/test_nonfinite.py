"""With `--on-nonfinite skip` a step that is not finite changes no weight, no moment and no schedule, and is counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.providers import Loss, Reward
from rlhf_core.contract.results import LossTerms, Reduction, RewardOutput
from rlhf_core.errors import RunStopped
from rlhf_core.run.iteration import Iteration
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_run
from rlhf_core.testing.tiny_algorithm import TinyLoss

OPTIONS: dict[str, Any] = {
    "model": "tiny:hidden=16,layers=1",
    "steps": 3,
    "actor": {"optim": {"lr": 1e-2, "schedule": "linear"}},
}


@dataclass(frozen=True)
class Broken(Loss):
    """A policy gradient whose loss or gradient is nan at the second step."""

    gradient: bool = False
    """only the gradient"""
    constant: bool = False
    """only the loss: nan is added to it, which leaves its gradient finite"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> LossTerms:
        values_NT = TinyLoss()(outputs, batch).values
        if batch.step.number == 2:
            zeros_NT = (outputs["logprobs_NT"] - outputs["logprobs_NT"].detach()).abs()
            values_NT = values_NT + (zeros_NT.sqrt() if self.gradient else torch.log(zeros_NT))
            values_NT = TinyLoss()(outputs, batch).values + math.nan if self.constant else values_NT
        return LossTerms(values_NT, Reduction("token"))


@dataclass(frozen=True)
class NanReward(Reward):
    """Lengths; of the second step's completions, one has none."""

    bad: float = math.nan
    """what stands in its place"""
    at: int = 2
    """step"""

    def __call__(self, rollouts: Batch) -> RewardOutput:
        lengths_N = rollouts.lengths_N.float()
        rewards_N = lengths_N.clone()
        if rollouts.step.number == self.at:
            rewards_N[1] = self.bad
        return RewardOutput(rewards_N, metrics={"half": lengths_N / 2})


class Watching(Run):
    """Remembers weights, moments and schedule after each step."""

    def finish(self, iteration: Iteration, credited: Mapping[str, Batch]) -> None:
        trainable: Any = self.roles["actor"].trainable  # type: ignore[attr-defined]
        self.states: list[Any] = [*getattr(self, "states", []), json.dumps(flat(trainable._state()))]
        super().finish(iteration, credited)


def flat(state: Any) -> Any:
    """A state as plain values."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {str(key): flat(value) for key, value in state.items()}
    return [flat(value) for value in state] if isinstance(state, (list, tuple)) else state


def watched(output: Path, **options: Any) -> Watching:
    run = Watching(tiny_run(output, **OPTIONS | options).config)
    run.train()
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "broken",
    [{"loss": Broken()}, {"loss": Broken(gradient=True)}, {"loss": Broken(constant=True)}, {"reward": NanReward()}],
    ids=["loss", "gradient", "constant", "reward"],
)
def test_a_skipped_step_leaves_weights_optimiser_and_schedule_alone_and_is_counted(
    broken: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = watched(tmp_path, on_nonfinite="skip", **broken)
    assert run.states[1] == run.states[0]
    assert run.states[2] != run.states[1], "the step after it trains again"
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["skipped/actor"] for row in rows] == [0, 1, 0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert "loss/actor" not in rows[1], "there was no update to tell of"
    learning_rates = [row["lr/actor"] for row in rows if "lr/actor" in row]
    assert learning_rates == pytest.approx([1e-2, 1e-2 * 2 / 3]), "linear over three steps, of which two were taken"
    samples = lines(tmp_path / "failed" / "step-2.jsonl")
    assert samples and all({"prompt", "completion", "tokens"} < set(row) for row in samples)
    assert sum("failed/step-2.jsonl" in line for line in capsys.readouterr().err.splitlines()) == 1


def test_a_reward_that_is_not_finite_stops_the_run_and_its_samples_are_kept(tmp_path: Path) -> None:
    with pytest.raises(RunStopped) as caught:
        watched(tmp_path, reward=NanReward(bad=-math.inf), save_every=1)
    said = str(caught.value)
    assert said.startswith("step 2: reward NanReward (") and "rewards_N = -inf for sample 1, prompt " in said
    path = tmp_path / "failed" / "step-2.jsonl"
    assert f"; 1 samples are in {path}, and the newest checkpoint is step-1: fix the reward" in said
    (row,) = lines(path)
    assert row["rewards_N"] == "-inf" and row["completion"] and row["reward"].startswith("reward NanReward")
    assert "Infinity" not in path.read_text() and "NaN" not in path.read_text(), "any reader of JSON can read it"


def test_a_run_that_stopped_can_go_on_by_skipping(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match='or continue with on_nonfinite="skip"'):
        watched(tmp_path, reward=NanReward(), save_every=1)
    watched(tmp_path, reward=NanReward(), save_every=1, on_nonfinite="skip", resume=True)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_float16_overflow_is_counted_and_one_that_no_scale_helps_stops_the_run(tmp_path: Path) -> None:
    """A scale of 1 leaves nothing to halve: the gradient itself is not finite."""
    actor = {"optim": {"lr": 1e-2}, "dtype": "float16"}
    run = watched(tmp_path / "counted", loss=Broken(gradient=True), actor=actor)
    rows = lines(tmp_path / "counted" / "metrics.jsonl")
    assert [row.get("skipped/actor") for row in rows] == [None, 1, None]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    scales = [row["loss_scale/actor"] for row in rows]
    assert scales[2] == scales[1] / 2
    assert run.states[0] != run.states[2]

    class Unscaled(Run):
        def finish(self, iteration: Iteration, credited: Mapping[str, Batch]) -> None:
            trainable: Any = self.roles["actor"].trainable  # type: ignore[attr-defined]
            trainable.scaler.update(1.0)
            super().finish(iteration, credited)

    config = tiny_run(tmp_path / "stopped", **OPTIONS | {"actor": actor}, loss=Broken(gradient=True)).config
    with pytest.raises(RunStopped, match="step 2: the gradient of role 'actor' has norm nan"):
        Unscaled(config).train()
