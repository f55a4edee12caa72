"""Roles and a rollout engine that take turns on a device: each is awake while it works (see `residents`).

Callers see a role and an engine as ever. A role is awake around `infer`, `train`, `weights`, `save` and the like; an engine
around a call, and with its weights alone while it takes new ones. Who needs another's memory is awake with it: the reference
that is an adapted actor's base, a loss that compares two roles, an engine that samples from the trained weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.engines import Stateful
from rlhf_core.contract.memory import RoleMemory
from rlhf_core.contract.providers import Rollout
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.launcher.residents import Part, Resident, Residents

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch, Prompts, Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.options import Sampling

__all__ = ["ENGINE", "SharedPlacement", "SharedRole", "SharedRollout", "Turn"]

ENGINE = "rollout"
"""The rollout engine's name among residents."""


@dataclass
class Turn:
    """Turn of a role on its device."""

    residents: Residents
    role: str
    memory: RoleMemory
    """forecast memory"""
    names: tuple[str, ...]
    """residents that are awake while it works"""

    def __call__(self, use: str, work: int = 0) -> AbstractContextManager[None]:
        """Return a context in which the role may do `use`, with `work` bytes for it."""
        return self.residents.awake(*self.names, work=work, use=f"{use} the {self.role}")


class SharedRole(Role):
    """Put before the class of a role: its calls wait for their turn."""

    turn: Turn

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        with self.turn("ask", self.turn.memory.inference):
            return super().infer(batch, names, source)

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        with self.turn("train", self.turn.memory.training):
            return super().train(work)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], decay: float = 0.0) -> None:
        with self.turn("load"):
            super().load_weights(weights, decay)

    def save(self, folder: str) -> None:
        with self.turn("save"):
            super().save(folder)

    def snapshot(self) -> Callable[[str], None] | None:
        with self.turn("save"):
            return super().snapshot()

    def load(self, folder: str) -> None:
        with self.turn("load"):
            super().load(folder)

    def export(self, folder: str) -> None:
        with self.turn("export"):
            super().export(folder)


@dataclass(frozen=True)
class SharedRollout(Rollout):
    """A provider whose engine takes turns with the roles.

    Args:
        provider: the provider.
        residents: those who share the device.
        agree: returns the most of a number over the ranks.
        homes: residents that are awake while a role works, by role.
        caches: bytes that sampling a role takes, by forecast.
        weights: bytes of the weights of an engine that has its own, by forecast.
        apart: the engine is in separate processes, and keeps the weights that it was sent there.
    """

    provider: Rollout
    residents: Residents
    agree: Callable[[int], int]
    homes: Mapping[str, tuple[str, ...]]
    caches: Mapping[str, int]
    weights: int
    apart: bool = False

    def open(self, context: OpenContext) -> Any:
        """Open the engine when there is room for it, and register it."""
        inside = self.provider.exact
        """it samples from the trained weights, and keeps buffers that point to them"""
        total = max(self.caches.values(), default=0)
        weights = min(total, self.weights) if total else self.weights
        if not inside:
            self.residents.make_room(total, "open the rollout engine")
        opened: Any = self.provider.open(context)
        kind = _StatefulEngine if isinstance(opened, Stateful) else _SharedEngine
        engine = kind(opened, self.residents, self.homes, self.caches if inside else {}, self.apart)
        known: dict[Part, int] | None = {"weights": weights, "cache": total - weights} if total else None
        self.residents.add(
            Resident(
                ENGINE,
                sleep=lambda level: self.agree(engine.sleep(level)),
                wake=lambda part: self.agree(opened.wake(part)),
                sizes={"all": 0} if inside else known,
                weights=weights,
                parts=("all",) if inside else ("weights", "cache"),
                follows=frozenset(self.caches) if inside else frozenset(),
            )
        )
        return engine


class _SharedEngine:
    """An engine that is awake while it samples. Everything else is the engine's own.

    Args:
        engine: the engine.
        residents: those who share the device.
        homes: residents that are awake while a role works, by role.
        caches: bytes that sampling takes, by role, if the engine samples from the roles' own weights.
        apart: the engine keeps what weights it was sent.
    """

    def __init__(
        self,
        engine: Any,
        residents: Residents,
        homes: Mapping[str, tuple[str, ...]],
        caches: Mapping[str, int],
        apart: bool,
    ) -> None:
        self._engine, self._residents, self._homes, self._caches = engine, residents, homes, caches
        self._asks = not (caches or apart)
        """the engine would take weights that it lacks from the role, in the middle of a call"""
        self._has: set[str] = set()
        """roles whose weights it has"""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _sampling(self, role: Role) -> AbstractContextManager[None]:
        if self._asks and role.name not in self._has:  # while the role and the weights alone are awake
            self.sync(role)
        names = self._homes[role.name] if self._caches else ()
        work = self._caches.get(role.name, 0)
        return self._residents.awake(ENGINE, *names, work=work, use=f"sample the {role.name}")

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        with self._sampling(role):
            rollouts: Rollouts = self._engine(role, prompts, sampling)
        return rollouts

    @contextmanager
    def session(self, role: Role) -> Iterator[Callable[[Prompts, Sampling], Rollouts]]:
        with self._sampling(role), self._engine.session(role) as sample:
            yield sample

    def sync(self, role: Role) -> Mapping[str, float]:
        """Bring the role's weights; the cache may sleep meanwhile."""
        names = () if self._caches else (ENGINE, *self._homes.get(role.name, ()))
        with self._residents.awake(*names, part="weights", use="sync the rollout engine"):
            metrics: Mapping[str, float] = self._engine.sync(role)
        self._has.add(role.name)
        return metrics

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give memory back; at level 2 the weights are gone."""
        if level == 2:
            self._has.clear()
        return int(self._engine.sleep(level))

    def close(self) -> None:
        self._engine.close()


class _StatefulEngine(_SharedEngine):
    """One that is part of every checkpoint."""

    def state_dict(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._engine.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._engine.load_state_dict(state)


class SharedPlacement(Placement):
    """A placement that counts the switches."""

    def __init__(self, roles: dict[str, Role], rollout: Rollout | None, world: World, residents: Residents) -> None:
        super().__init__(roles, rollout, world)
        self.residents = residents

    def metrics(self) -> Mapping[str, float]:
        return self.residents.metrics()
