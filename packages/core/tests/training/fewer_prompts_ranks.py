"""Runs whose batches have fewer prompts than there are ranks, which write what they trained to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_core import make_config
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.launcher.local import join_world
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.run.run import Run

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch, Rollouts


@dataclass(frozen=True)
class OwnRows(Reward):
    """A reward that no rank calls without rows; it may abstain from odd prompts."""

    odd: bool = True
    metrics: bool = False

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        """Return the mean of each completion's tokens modulo 7, and its first token."""
        assert len(rollouts), "a rank without completions has nothing to score"
        inside_NT = torch.arange(rollouts.tokens_NT.shape[1]) < rollouts.lengths_N[:, None]
        means_N = (rollouts.tokens_NT % 7 * inside_NT).sum(1) / rollouts.lengths_N
        abstained_N = None if self.odd else rollouts["uids_N"] % 2 == 1
        first = {"first": rollouts.tokens_NT[:, 0].float()} if self.metrics else {}
        return RewardOutput(means_N, abstained_N=abstained_N, metrics=first)


class Rounding(HuggingFaceRollout):
    """An engine whose log-probabilities are not to the bit those of training, which then takes its own as old ones."""

    exact = False


def run_few(output: str, algorithm: Any = "grpo", **given: Any) -> None:
    """Train, and write the weights, with the number of rows that each rank had in each step."""
    torch.set_num_threads(1)
    world = join_world()
    seen: list[list[int]] = []

    class Counting(Run):
        def finish(self, iteration: Any, credited: Any) -> None:
            super().finish(iteration, credited)
            batches: list[Batch] = list(iteration.batches.values())
            seen.append(self.world.gather(len(batches[0])))

    usual: dict[str, Any] = {
        "model": "tiny",
        "steps": 2,
        "batch_size": 1,
        "minibatches": 1,
        "sampling": {"n": 4, "max_new_tokens": 6},
        "reward": OwnRows(),
        "actor": {"optim": {"lr": 1e-3, "eps": 1e-4}},
    }
    options = {name: value for name, value in {**usual, **given}.items() if value is not None}
    run = Counting(make_config(algorithm, **options, output=output))
    run.train()
    weights = {
        f"{name}.{key}": each.clone() for name in run.plan.trained_roles for key, each in run.roles[name].weights()
    }
    if world.rank == 0:
        torch.save({"seen": seen, "weights": weights}, f"{output}.pt")


CRITIC = {"optim": {"lr": 1e-3, "eps": 1e-4}}
QUICK: dict[str, dict[str, Any]] = {
    "grpo": {"steps": 1},
    "old": {"steps": 2, "rollout": Rounding()},
    "heldout": {
        "steps": 1,
        "evaluator": ["heldout", "pass_at_k", "policy_stats", "preference", "win_rate"],
        "reward": OwnRows(metrics=True),
    },
    "margins": {
        "algorithm": "reward",
        "loss": {"use": "bradley_terry", "margin": True},
        "evaluator": ["heldout_loss"],
        "reward": None,
        "sampling": None,
        "actor": None,
    },
    "abstains": {"batch_size": 2, "reward": OwnRows(odd=False), "steps": 3},
}
SLOW: dict[str, dict[str, Any]] = {
    "kept": {"sampling": {"n": 4, "max_new_tokens": 6, "top_p": 0.7}},
    "alone": {"algorithm": "reinforce_pp", "batch_size": 2, "sampling": {"n": 1, "max_new_tokens": 6}},
    "ppo": {"algorithm": "ppo", "batch_size": 2, "critic": CRITIC},
    "minibatches": {"batch_size": 2, "minibatches": 2, "update_epochs": 2},
    "dynamic": {"algorithm": "dapo", "batch_size": 2},
    "pairs": {"algorithm": "online_dpo"},
    "repulse": {"algorithm": "repulse", "proposal": CRITIC},
}
"""Options of each run, for three ranks; what is None is left out."""
HELD_OUT = ("heldout", "margins")
"""Runs on pairs."""


def write_pairs(folder: Path) -> str:
    """Write preferences with a margin, of several sources."""
    rows = [
        {"prompt": f"a b {i}", "chosen": "c " * (i + 1), "rejected": "d e", "margin": i / 4, "datasource": "xy"[i % 2]}
        for i in range(12)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def run_all(cases: Mapping[str, dict[str, Any]], pairs: str, output: str) -> None:
    """Make every run. Two pairs are held out of those in the file `pairs`."""
    data = {"use": "json", "path": pairs, "heldout": 2, "number_keys": ("margin",)}
    for name, given in cases.items():
        rows = {"data": data} if name in HELD_OUT else {}
        run_few(f"{output}-{name}", **given, **rows)
