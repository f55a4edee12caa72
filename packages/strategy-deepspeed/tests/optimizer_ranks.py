"""Ranks of the test of optimizers that DeepSpeed does not know by name: training under each stage, and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_core.contract.optimizers import OptimizerProvider, parameter_groups
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.providers import Strategy
from rlhf_core.launcher.local import join_world
from rlhf_core.testing import tiny_rollouts, tiny_run
from rlhf_core.testing.strategies import with_advantages
from rlhf_core.training.local_role import LocalRole

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Momentum(OptimizerProvider):
    """Gradient descent with momentum, whose state is one number per weight."""

    elementwise: ClassVar[bool] = True

    def __call__(self, named_parameters: Iterable[tuple[str, Any]], total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(named_parameters, 0.1), lr=self.lr, momentum=0.9)


def actor(strategy: Strategy) -> LocalRole:
    """The actor of a run of the kit."""
    options = TrainedOptions(model="tiny", optim=Momentum(lr=0.1, schedule="constant", max_grad_norm=0.5))
    return LocalRole(tiny_run("unused", strategy=strategy, actor=options).plan, "actor")


def train(role: LocalRole, steps: int) -> dict[str, Tensor]:
    """Return the weights after some more steps, each rank on its rows."""
    batch = with_advantages(tiny_rollouts())
    mine = batch.rows(list(range(role.world.rank, len(batch), role.world.size)))
    rows = replace(mine, world=role.world)
    for _ in range(steps):
        role.train({key: rows for key, _ in role.spec.terms})
    return {name: weight.clone() for name, weight in role.weights()}


def follow(folder: str) -> None:
    """Train under each stage: two steps, a checkpoint, and two more."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    torch.set_num_threads(1)
    world = join_world()
    found: dict[int, Any] = {}
    for stage in STAGES:
        role = actor(DeepSpeed(stage=stage, persist=8 if stage == 3 else None))
        train(role, 2)
        place = Path(folder, str(stage))
        place.mkdir(exist_ok=True)
        role.save(str(place))
        found[stage] = train(role, 2)
    if world.rank == 0:
        torch.save(found, Path(folder, "found.pt"))
