"""Every role in this process (or, under `torchrun` and `deepspeed`, a rank of every role in each process)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.distributed import TorchWorld, World, data_world
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Launcher
from rlhf_core.contract.roles import Placement
from rlhf_core.errors import OptionError, UsageError
from rlhf_core.launcher.sharing import SharingOptions, plan_sharing
from rlhf_core.lazy import torch
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlhf_core.training.local_role import LocalRole

__all__ = ["Local"]


@dataclass(frozen=True)
class Local(SharingOptions, Launcher):
    """All roles in one process; under torchrun or deepspeed, one rank of each in every process."""

    one_process: ClassVar[bool] = True
    """roles see each other's models"""

    timeout: float = 1800.0
    """seconds that ranks wait for each other in a collective operation before the run fails"""

    def __call__(self, plan: Plan) -> Placement:
        from rlhf_core.launcher.local_turns import LocalTurns
        from rlhf_core.training.local_role import LocalRole

        if self.timeout <= 0:
            raise OptionError("timeout", f"{self.timeout:g}: give a number of seconds above 0")
        world = join_world(self.timeout)
        together = plan.config.providers["strategy"].ranks_per_row
        if together > 1 and world.size == 1:
            raise UsageError(
                f"one process cannot form a group of {together} ranks that share rows; start {together} processes"
            )
        world = data_world(together) if together > 1 else world
        engine = plan.online and not plan.config.providers["rollout"].exact
        sharing = plan_sharing(self, plan, _device_bytes(), world.size, list(plan.roles), engine)
        shared = LocalTurns(plan, world, sharing) if sharing is not None else None
        roles: dict[str, LocalRole] = {}
        for name in sorted(plan.roles, key=lambda each: not plan.roles[each].trained):  # who lends comes first
            owner = roles.get(plan.base_owner(name))
            roles[name] = shared.role(name, owner) if shared is not None else LocalRole(plan, name, base_owner=owner)
        if world.leads:
            _report_copies(plan, roles)
        for role in roles.values():
            role.bind_comparisons(roles)
        rollout = plan.config.providers.get("rollout") if plan.online else None
        placed = {name: roles[name] for name in plan.roles}
        return shared.placement(placed, rollout) if shared is not None else Placement(dict(placed), rollout, world)


def _device_bytes() -> int:
    """Return the memory of this rank's GPU; 0 without one."""
    return int(torch.cuda.get_device_properties().total_memory) if torch.cuda.is_available() else 0


def _report_copies(plan: Plan, roles: Mapping[str, LocalRole]) -> None:
    """Log each frozen role whose model is a second copy of the base of another role's adapters."""
    for name in plan.roles:
        owner, differing = plan.nearest_base(name)
        if not owner or roles[name].module is roles[owner].module:
            continue
        mine, theirs = plan.roles[name].options, plan.roles[owner].options
        pairs = [f"{each} is {getattr(mine, each)}, not {getattr(theirs, each)}" for each in differing]
        why = ", ".join(pairs) or "the strategy cannot share a base"
        log.info(f"the {name} is loaded in addition to the {owner} and cannot share its base: {why}")


def join_world(timeout: float = Local.timeout, store: Any = None) -> World:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR …), or return this process alone.

    Args:
        timeout: seconds that a collective operation may take, unless the group exists.
        store: the ranks meet there; at MASTER_ADDR and MASTER_PORT without one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            local, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= devices:
                raise UsageError(
                    f"process {local + 1} of this node has no GPU, since the node has {devices}; start at most "
                    f"{devices} processes per node, or set CUDA_VISIBLE_DEVICES= to run on CPUs"
                )
            torch.cuda.set_device(local)
        # both, where there are GPUs: gradients are on them, counts and metrics are not
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        here: dict[str, Any] = {}
        if store is not None:
            here = {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout), **here)
    return TorchWorld()
