"""Roles and rollout engines that sit in the same bundles take turns on their devices.

The controller keeps the books (`rlhf_core.launcher.residents`): one for each set of roles and engines that meet in some bundle.
Workers sleep and wake on request, each with its own allocator, whose cache it gives back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.memory import RoleMemory
from rlhf_core.launcher.residents import GIB, Resident
from rlhf_core.launcher.sharing import Sharing, SharingOptions, plan_sharing
from rlhf_core.launcher.turns import SharedRole, SharedRollout, Turn
from rlhf_distributed_ray.group import RoleGroup
from rlhf_distributed_ray.places import ENGINE

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.providers import Rollout
    from rlhf_distributed_ray.crew import Crew
    from rlhf_distributed_ray.placement import Layout
    from rlhf_distributed_ray.sending import Shipment
    from rlhf_distributed_ray.transport import Shipper

__all__ = ["RayTurns", "SharedRoleGroup", "neighbors"]

CONTEXT_BYTES = GIB // 2
"""GPU memory of a process before its first tensor: the CUDA context and the kernels of its libraries."""


class SharedRoleGroup(SharedRole, RoleGroup):
    """A role held by actors, which waits for its turn."""

    def awake(self) -> AbstractContextManager[None]:
        """While it is open, the states are on their devices."""
        return self.turn("save")

    def buckets(self) -> Iterator[Any]:
        """References to buckets of weights; the role is awake until the last one is asked for."""
        with self.turn("read"):
            yield from super().buckets()

    def send_weights(self, engines: list[Any], sync: int) -> Shipment:
        """Let rank 0 send the weights to these engines, which may be in another place; the role is awake meanwhile."""
        with self.turn("read"):
            return super().send_weights(engines, sync)


class RayTurns:
    """Turns of the roles and engines that share bundles in a layout.

    Args:
        options: of the launcher.
        plan: the run.
        layout: who sits where.
        device_bytes: by role, memory of the smallest GPU of a worker; 0 if they have none.
    """

    def __init__(self, options: SharingOptions, plan: Plan, layout: Layout, device_bytes: Mapping[str, int]) -> None:
        self.plan = plan
        self._sets: list[Sharing] = []
        self._of: dict[str, Sharing] = {}
        """the turns that a role, or the engines, take part in"""
        for names in neighbors(layout):
            roles = [name for name in names if name != ENGINE]
            ranks = min((len(layout.seats[name]) for name in roles), default=1)
            here = min((device_bytes[name] for name in roles), default=0)  # other places may have no GPU
            free = max(0, here - CONTEXT_BYTES * len(names))
            found = plan_sharing(options, plan, free, ranks, roles, ENGINE in names)
            if found is not None:
                self._sets.append(found)
                self._of |= dict.fromkeys(names, found)

    def group(self, name: str, crew: Crew, shipper: Shipper) -> RoleGroup:
        """Return the role that these actors hold."""
        spec, sharing = self.plan.roles[name], self._of.get(name)
        if sharing is None:
            return RoleGroup(spec, crew, shipper, self.plan.config.output)
        group = SharedRoleGroup(spec, crew, shipper, self.plan.config.output)
        group.turn = Turn(sharing.residents, name, self._memory(name), (name,))
        return group

    def chains(self, roles: Sequence[str]) -> list[list[str]]:
        """Return the roles in lists: those that load in turn, so that each finds room; all others load at once."""
        together = [[role for role in roles if self._of.get(role) is each] for each in self._sets]
        return [each for each in together if each] + [[role] for role in roles if role not in self._of]

    def _memory(self, name: str) -> RoleMemory:
        """Return the forecast of a role, which holds its whole model here whosever base it is."""
        return self._of[name].memory[name]

    @contextmanager
    def loading(self, group: RoleGroup) -> Iterator[None]:
        """While it is open there is room for a role that is not on its devices yet; afterwards it is there."""
        sharing = self._of.get(group.name)
        if sharing is None:
            yield
            return
        size = self._memory(group.name).resident
        sharing.residents.remove(group.name)  # one that is started anew
        sharing.residents.make_room(size, f"load the {group.name}")
        yield
        sharing.residents.add(
            Resident(
                group.name,
                sleep=lambda _: group.sleep(),
                wake=lambda _: group.wake(),
                sizes={"all": size},
                least=size,
            )
        )

    def engine(self, engines: Rollout) -> Rollout:
        """Return what core opens in the place of the engines, whose size is measured when they first sleep."""
        sharing = self._of.get(ENGINE)
        if sharing is None:
            return engines
        homes = {name: (name,) for name, found in self._of.items() if found is sharing and name != ENGINE}
        weights = max((self._memory(name).weights for name in homes if name in self.plan.sources), default=0)
        return SharedRollout(engines, sharing.residents, lambda size: size, homes, {}, weights, apart=True)

    def metrics(self) -> Mapping[str, float]:
        """Return seconds and GiB of the switches since it was last asked, by resident."""
        return {name: value for each in self._sets for name, value in each.residents.metrics().items()}


def neighbors(layout: Layout) -> list[list[str]]:
    """Return the names of a layout in sets: who shares a bundle with another, directly or through others."""
    sets: list[list[str]] = []
    for name, seats in layout.seats.items():
        near = [each for each in sets if any(set(layout.seats[other]) & set(seats) for other in each)]
        sets = [each for each in sets if each not in near]
        sets.append([*(other for each in near for other in each), name])
    return sets
