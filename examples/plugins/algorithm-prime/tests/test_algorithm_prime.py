"""PRIME against the equations in float64, and as a run: its order, its exports, a resume, and two ranks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_algorithm_prime.algorithm import ImplicitPRMLoss, Prime, PrimeAdvantage
from rlhf_core import Registry, Run, RunView, UsageError, hookimpl
from rlhf_core.testing import (
    check_advantage,
    check_algorithm,
    check_loss,
    tiny_extras,
    tiny_outputs,
    tiny_rewards,
    tiny_rollouts,
    tiny_run,
)

FLAGS: dict[str, Any] = {
    "model": "tiny:hidden=16,layers=1",
    "reward": {"use": "regex", "pattern": "[a-z]", "match": "anywhere"},
    "sampling": {"n": 3, "max_new_tokens": 6},
    "actor": {"optim": {"lr": 1e-2}},
    "prm": {"optim": {"lr": 1e-2}},
    "batch_size": 2,
}
WORDS = ["prime", "-p", "rlhf_algorithm_prime.plugin", "--model", "tiny:hidden=16,layers=1"]
WORDS += (
    "--reward regex --reward.pattern [a-z] --reward.match anywhere --sampling.n 3 --sampling.max-new-tokens 6".split()
)
WORDS += "--actor.optim.lr 1e-2 --prm.optim.lr 1e-2 --batch-size 2".split()
MEASURED = ("time/", "speed/", "memory/")


def rows(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]


def advantages(batch: Any, rewards_N: list[float], beta: float, gamma: float) -> list[list[float]]:
    """Equation 5 as it is written: for each completion i of a prompt with K, and each token t, in Python's float64."""
    prm, ref = (batch[name].double().tolist() for name in ("prm.logprobs_NT", "ref_logprobs_NT"))
    mask, group = batch.mask_NT.tolist(), batch.group_N.tolist()
    r = [[beta * (p - q) if on else 0.0 for p, q, on in zip(*row)] for row in zip(prm, ref, mask)]
    mean = [sum(values) / max(1, sum(on)) for values, on in zip(r, mask)]
    found = []
    for i, values in enumerate(r):
        others = [j for j in range(len(r)) if group[j] == group[i] and j != i]
        process = sum(mean[j] for j in others) / len(others)
        outcome = rewards_N[i] - sum(rewards_N[j] for j in others) / len(others)
        steps = [value - process if on else 0.0 for value, on in zip(values, mask[i])]
        returns = [sum(gamma ** (s - t) * steps[s] for s in range(t, len(steps))) for t in range(len(steps))]
        found.append([total + outcome if on else 0.0 for total, on in zip(returns, mask[i])])
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_advantage_is_equation_5(gamma: float) -> None:
    rollouts = tiny_rollouts()
    rewards = tiny_rewards(rollouts)
    extras = tiny_extras(PrimeAdvantage.needs, rollouts)
    found = PrimeAdvantage(0.05, gamma)(rewards, rollouts, extras)
    expected = advantages(rollouts.with_extras(**extras), rewards.total_N.double().tolist(), 0.05, gamma)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_loss_is_the_cross_entropy_of_the_outcome() -> None:
    rollouts = tiny_rollouts()
    rollouts = rollouts.with_extras(**tiny_extras(ImplicitPRMLoss.needs, rollouts))
    outputs = tiny_outputs({"logprobs_NT"}, rollouts)
    found = ImplicitPRMLoss(0.5)(outputs, rollouts).values
    for i, value in enumerate(found.tolist()):
        ratio = (outputs["logprobs_NT"].detach() - rollouts["ref_logprobs_NT"])[i].double()
        reward, outcome = 0.5 * float(ratio[rollouts.mask_NT[i]].sum()), float(rollouts["rewards_N"][i])
        right = 1 / (1 + math.exp(-reward))
        assert value == pytest.approx(-outcome * math.log(right) - (1 - outcome) * math.log(1 - right), abs=1e-6)


def test_providers_keep_their_contracts() -> None:
    assert check_algorithm(Prime()).trained_roles == ("prm", "actor")
    check_advantage(PrimeAdvantage())
    check_loss(ImplicitPRMLoss())


def test_a_mistake_is_one_line() -> None:
    rollouts = tiny_rollouts()
    rollouts = rollouts.with_extras(**tiny_extras(ImplicitPRMLoss.needs, rollouts))
    rollouts.extras["rewards_N"] = rollouts["rewards_N"] - 3
    with pytest.raises(
        UsageError, match="prime learns outcomes from 0 .wrong. to 1 .right., and the reward gave others"
    ):
        ImplicitPRMLoss()(tiny_outputs({"logprobs_NT"}, rollouts), rollouts)
    with pytest.raises(UsageError, match="beta must be above 0, not 0"):
        Prime(beta=0)
    with pytest.raises(UsageError, match=r"prime compares the completions of one prompt; sampling.n must be 2 or more"):
        tiny_run("unused", Prime(), sampling={"n": 1})


class Watcher:
    """Records of the policy's credit inputs, the `prm` outputs for the same tokens after the step, and the last weights."""

    def __init__(self) -> None:
        self.read: list[Any] = []
        self.now: list[torch.Tensor] = []
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    @hookimpl
    def rlhf_step_end(self, run: RunView) -> None:
        key = next(key for key, spec in run.plan.credits.items() if isinstance(spec.advantage, PrimeAdvantage))
        self.read.append(run.samples[key])
        self.now.append(run.roles["prm"].infer(run.samples[key], frozenset({"logprobs_NT"}))["logprobs_NT"])
        for name in ("actor", "prm"):
            self.weights[name] = {k: tensor.clone() for k, tensor in run.roles[name].weights()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Watcher]:
    registry, watcher = Registry(), Watcher()
    registry.register(watcher, "watcher")
    run = tiny_run(tmp_path_factory.mktemp("straight") / "run", Prime(), registry, steps=4, **FLAGS)
    run.train()
    return run, watcher


def test_a_run_reads_the_updated_prm_and_assigns_equation_5(straight: tuple[Run, Watcher]) -> None:
    _, watcher = straight
    assert any(0 < float(batch["rewards_N"].mean()) < 1 for batch in watcher.read), "outcomes of both kinds are there"
    for batch, now in zip(watcher.read, watcher.now, strict=True):
        torch.testing.assert_close(batch["prm.logprobs_NT"], now, atol=1e-6, rtol=0)
        assert float((now - batch["ref_logprobs_NT"]).abs().max()) > 1e-4, (
            "in the first step too: it was updated before"
        )
        expected = torch.tensor(advantages(batch, batch["rewards_N"].tolist(), 0.05, 1.0), dtype=torch.float64)
        torch.testing.assert_close(batch["advantages_NT"].double(), expected, atol=1e-6, rtol=0)


def test_output_model_is_the_policy_and_output_prm_the_reward_model(straight: tuple[Run, Watcher]) -> None:
    from transformers import AutoModelForCausalLM

    run, watcher = straight
    for folder, role in (("model", "actor"), ("prm", "prm")):
        exported = AutoModelForCausalLM.from_pretrained(run.output / folder).state_dict()
        assert all(torch.equal(exported[name], tensor) for name, tensor in watcher.weights[role].items()), role
    same = (torch.equal(watcher.weights["actor"][name], tensor) for name, tensor in watcher.weights["prm"].items())
    assert not all(same)


def test_a_resumed_run_has_the_numbers_of_a_straight_one(straight: tuple[Run, Watcher], tmp_path: Path) -> None:
    run, _ = straight
    tiny_run(tmp_path / "run", Prime(), steps=2, **FLAGS).train()
    tiny_run(tmp_path / "run", Prime(), steps=4, resume=True, **FLAGS).train()
    assert rows(tmp_path / "run") == rows(run.output)
    for folder in ("model", "prm"):
        files = [output / folder / "model.safetensors" for output in (tmp_path / "run", run.output)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_two_ranks_have_the_numbers_of_one(straight: tuple[Run, Watcher], tmp_path: Path) -> None:
    run, _ = straight
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "rlhf_core", *WORDS, "--steps", "4", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(run.output), rows(tmp_path / "run"), strict=True):
        names = [name for name in one if name != "padding" and "mismatch" not in name]
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)
