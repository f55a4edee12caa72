"""Ranks of the tests of moving averages: training under each stage, and what is averaged beside what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.providers import Strategy
from rlhf_core.launcher.local import join_world
from rlhf_core.testing import tiny_rollouts, tiny_run
from rlhf_core.testing.strategies import with_advantages
from rlhf_core.training.local_role import LocalRole

DECAY = 0.8
STEPS = 3
STAGES = [(0, "float32"), (1, "float32"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]


def actor(strategy: Strategy, dtype: str) -> LocalRole:
    """The actor of a run of the kit, with an average."""
    optim = AdamW(lr=1e-2, eps=1e-3, schedule="constant")  # smooth, where a gradient is rounding alone
    options = TrainedOptions(model="tiny", dtype=dtype, optim=optim, ema=DECAY)
    return LocalRole(tiny_run("unused", strategy=strategy, actor=options).plan, "actor")


def train(role: LocalRole) -> None:
    """One step on this rank's rows."""
    batch = tiny_rollouts()
    rows = with_advantages(batch.rows(list(range(role.world.rank, len(batch), role.world.size))))
    role.train({key: rows for key, _ in role.spec.terms})


def gathered(role: LocalRole) -> dict[str, Tensor]:
    """The whole weights of what is trained, float64."""
    named = role.average.by_name()
    return {name: role.trainable.full(role.module.get_parameter(name)).double().clone() for name in named}


def averages(role: LocalRole) -> dict[str, Tensor]:
    """The whole averages."""
    joined, module = role.trainable.join_shares, role.module
    return {name: joined(module.get_parameter(name), own).clone() for name, own in role.average.by_name().items()}


def follow(folder: str) -> None:
    """Train under each stage, and keep for the test what was averaged and what it should be."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    torch.set_num_threads(1)
    world = join_world()
    found: dict[Any, Any] = {}
    for number, dtype in STAGES:
        stage: Any = number
        # few numbers stay whole, so that shares of matrices and of vectors occur
        role = actor(DeepSpeed(stage=stage, persist=8 if stage == 3 else None), dtype)
        expected = gathered(role)
        for _ in range(STEPS):
            train(role)
            expected = {name: DECAY * expected[name] + (1 - DECAY) * weight for name, weight in gathered(role).items()}
        held = sum(each.numel() for each in role.average.buffers())
        role.sleep()
        role.wake()
        place = Path(folder, f"{stage}-{dtype}")
        place.mkdir(exist_ok=True)
        role.save(str(place))
        world.barrier()
        kept = averages(role)
        train(role)
        role.load(str(place))
        found[stage, dtype] = {"expected": expected, "found": kept, "loaded": averages(role), "held": held}
        role.export(f"{place}/model")
    if world.rank == 0:
        torch.save(found, Path(folder, "found.pt"))
