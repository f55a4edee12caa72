"""The roles and the rollout engine of one process, where they take turns on its device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf_core.launcher.residents import Resident
from rlhf_core.launcher.sharing import Sharing, companions
from rlhf_core.launcher.turns import SharedPlacement, SharedRole, SharedRollout, Turn
from rlhf_core.training.local_role import LocalRole

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.providers import Rollout
    from rlhf_core.contract.roles import Placement

__all__ = ["LocalTurns"]


class _SharedLocalRole(SharedRole, LocalRole):
    """A role in this process."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors; the role is awake until the last one is read."""
        with self.turn("read"):
            yield from super().weights()

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors without adapters; the role is awake until the last one is read."""
        with self.turn("read"):
            yield from super().base_weights()

    def save_adapters(self, folder: str) -> bool:
        """Write the adapters, with the role awake."""
        with self.turn("read"):
            return super().save_adapters(folder)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """While it is open, the module is awake, whole, and each rank may use it independently."""
        with self.turn("read"), super().gathered():
            yield


class LocalTurns:
    """The roles and the engine of this process, which take turns on its device.

    Args:
        plan: the run.
        world: the ranks; they switch together.
        sharing: the turns.
    """

    def __init__(self, plan: Plan, world: World, sharing: Sharing) -> None:
        self.plan, self.world, self.residents, self.memory = plan, world, sharing.residents, sharing.memory
        self.homes: dict[str, tuple[str, ...]] = {}
        """residents that are awake while a role works, by role"""

    def agree(self, size: int) -> int:
        """Return the most bytes of any rank, so that all ranks decide alike."""
        return size if self.world.size == 1 else max(self.world.gather(size))

    def role(self, name: str, owner: LocalRole | None) -> LocalRole:
        """Load a role when there is room for it."""
        memory = self.memory[name]
        self.residents.make_room(memory.resident, f"load the {name}")
        role = _SharedLocalRole(self.plan, name, base_owner=owner)
        lent = owner is not None and role.module is owner.module
        home = owner.name if owner is not None and lent else name
        self.homes[name] = tuple(sorted({home, *companions(self.plan, name)}))
        role.turn = Turn(self.residents, name, memory, self.homes[name])
        if not lent:
            self.residents.add(
                Resident(
                    name,
                    sleep=lambda _: self.agree(role.sleep()),
                    wake=lambda _: self.agree(role.wake()),
                    sizes={"all": self.agree(max(role.trainable.held_bytes, memory.resident))},
                    least=memory.resident,
                )
            )
        return role

    def placement(self, roles: Mapping[str, LocalRole], rollout: Rollout | None) -> Placement:
        """Return what the loop sees."""
        caches = {name: self.memory[name].cache for name in self.plan.sources if name in roles}
        weights = max((self.memory[name].weights for name in caches), default=0)
        engine = None
        if rollout is not None:
            engine = SharedRollout(rollout, self.residents, self.agree, self.homes, caches, weights)
        return SharedPlacement(dict(roles), engine, self.world, self.residents)
