"""Observer hooks are called at their moments, in the first rank or in all, and with what is true then."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core import Evaluator, Registry, Reward, RewardOutput, Rollouts, RunView, hookimpl
from rlhf_core.testing import tiny_run

HERE = Path(__file__).parent
MODEL = "tiny:hidden=16,layers=1"


@dataclass(frozen=True)
class Done(Evaluator):
    """An evaluator whose numbers are known: the steps so far."""

    def __call__(self, run: RunView) -> Mapping[str, float]:
        return {"done": float(run.step)}


def observed(tmp_path: Path, hooks: Mapping[str, Any], **options: Any) -> Any:
    """A finished run of two steps that a plugin with these hooks observes."""
    registry = Registry(autoload=False)
    registry.register(SimpleNamespace(**{name: hookimpl(hook) for name, hook in hooks.items()}), "watcher")
    run = tiny_run(tmp_path, registry=registry, model=MODEL, **options)
    run.train()
    return run


def test_rlhf_rollouts_ready_has_the_rewards_that_are_trained_on(tmp_path: Path) -> None:
    seen: list[tuple[int, str, list[float]]] = []

    def ready(run: RunView, source: str, rollouts: Rollouts, rewards: RewardOutput) -> None:
        assert rollouts["rewards_N"] is rewards.rewards_N
        seen.append((run.step, source, rewards.rewards_N.tolist()))

    def end(run: RunView) -> None:
        (batch,) = run.samples.values()
        assert seen[-1] == (run.step - 1, "actor", batch["rewards_N"].tolist())

    observed(tmp_path, {"rlhf_rollouts_ready": ready, "rlhf_step_end": end})
    assert len(seen) == 2


@dataclass(frozen=True)
class Undefined(Reward):
    """nan for every completion."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [math.nan] * len(rollouts)


def test_rlhf_rollouts_ready_has_rewards_of_zero_where_a_step_is_skipped(tmp_path: Path) -> None:
    seen: list[list[float]] = []

    def ready(rollouts: Rollouts) -> None:
        assert rollouts.step.skip
        seen.append(rollouts["rewards_N"].tolist())

    observed(tmp_path, {"rlhf_rollouts_ready": ready}, reward=Undefined(), on_nonfinite="skip")
    assert seen == [[0.0] * len(seen[0])] * 2


def test_rlhf_before_update_sees_the_weights_before_each_update(tmp_path: Path) -> None:
    seen: list[tuple[str, int, torch.Tensor]] = []

    def before(run: RunView, role: str) -> None:
        weights = torch.cat([tensor.flatten().clone() for _, tensor in run.roles[role].weights()])
        seen.append((role, run.roles[role].version, weights))

    run = observed(tmp_path, {"rlhf_before_update": before})
    assert [(role, version) for role, version, _ in seen] == [("actor", 0), ("actor", 1)]
    last = torch.cat([tensor.flatten() for _, tensor in run.roles["actor"].weights()])
    assert not torch.equal(seen[0][2], seen[1][2]) and not torch.equal(seen[1][2], last)


def test_rlhf_evaluated_comes_at_the_start_within_steps_and_at_the_end(tmp_path: Path) -> None:
    calls: list[Any] = []

    def evaluated(run: RunView, step: int, metrics: Mapping[str, float]) -> None:
        assert run.evaluations[-1] == (step, metrics)
        calls.append((step, metrics["eval/done"]))

    def end(step: int, metrics: Mapping[str, float]) -> None:
        calls.append(f"end of {step}, {metrics.get('eval/done')}")

    options: dict[str, Any] = {"evaluator": Done(), "steps": 3, "eval_every": 2}
    observed(tmp_path, {"rlhf_evaluated": evaluated, "rlhf_step_end": end}, **options)
    assert calls == [(0, 0.0), "end of 1, None", (2, 2.0), "end of 2, 2.0", "end of 3, None", (3, 3.0)]


def test_rlhf_evaluated_is_not_called_where_nothing_is_measured(tmp_path: Path) -> None:
    observed(tmp_path, {"rlhf_evaluated": lambda run: pytest.fail("there is no evaluator")})


def test_hooks_are_called_in_every_rank_where_that_is_declared(tmp_path: Path) -> None:
    """Two gloo ranks; the observers and the plugin of `watching_ranks`. The second rank alone ends the run after step 2."""
    module = "watching_ranks"
    words = ["rlhf_core.testing.tiny_algorithm:TinyAlgorithm", "--model", MODEL, "--steps", "9", "--batch-size", "2"]
    words += ["-p", module, "--observer", f"{module}:Everywhere,{module}:First", "--evaluator", f"{module}:Ranks"]
    words += ["--sampling.n", "2", "--sampling.max-new-tokens", "4", "--output", str(tmp_path / "run")]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "rlhf_core",
    ]
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]

    def lines(name: str) -> list[str]:
        path = tmp_path / "run" / f"{name}.txt"
        return path.read_text().splitlines() if path.exists() else []

    steps = [text for k in (1, 2) for text in ("actor sampled 2", f"actor before {k}", f"step {k}")]
    whole = ["start", "evaluated 0: ['eval/ranks']", *steps, "evaluated 2: ['eval/ranks']", "end None"]
    assert lines("everywhere-0") == lines("everywhere-1") == lines("first-0") == whole
    assert lines("first-1") == []
    assert lines("plugin-0") == lines("plugin-1") == ["0 of 2 ranks", "2 of 2 ranks"]
