"""Every role in this process (or, under `torchrun` and `deepspeed`, a rank of every role in each process)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.plan import Plan
from rlhf_core.types import Placed
from rlhf_core.world import TorchWorld, World

__all__ = ["Local"]


@dataclass(frozen=True)
class Local:
    """All roles in one process; under torchrun or deepspeed, one rank of each in every process."""

    def __call__(self, plan: Plan) -> Placed:
        from rlhf_core.roles import LocalRole

        world = join_world()
        if plan.config.batch_size % world.size:
            raise UsageError(f"--batch-size {plan.config.batch_size} does not divide over {world.size} ranks")
        roles = {name: LocalRole(plan, name) for name in plan.roles}
        return Placed(dict(roles), plan.config.providers.get("rollout") if plan.online else None, world)


def join_world() -> World:
    """The process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR …), or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # both, where there are GPUs: gradients are on them, counts and metrics are not
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return TorchWorld()
