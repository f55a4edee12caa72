"""Residents of a device: each wakes before it works, and the least recently used sleep if memory is short.

A resident is a role, or the rollout engine. It registers its calls `sleep` and `wake`, which return the bytes that moved, and
how large it is by forecast; the first switch measures it. An engine wakes in two parts, weights before the cache. Nothing here
knows a device: in one process and under Ray the same bookkeeping decides, and on a CPU it moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import RLock
from typing import Literal

from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.clock import current_time

__all__ = ["GIB", "Part", "Resident", "Residents"]

GIB = 2**30

Part = Literal["weights", "cache", "all"]


@dataclass
class Resident:
    """One who is on the device, or asleep."""

    name: str
    sleep: Callable[[Literal[1, 2]], int]
    """gives memory back, at a level; returns its bytes"""
    wake: Callable[[Part], int]
    """takes the memory of a part again; returns its bytes"""
    sizes: dict[Part, int] | None
    """bytes by part, in the order in which they wake; None until a first sleep measures them"""
    least: int = 0
    """bytes that it will have, such as those of an optimizer that has not stepped"""
    weights: int = 0
    """bytes of an engine's weights, by forecast, until they wake for the first time"""
    parts: tuple[Part, ...] = ("all",)
    follows: frozenset[str] = frozenset()
    """residents whose memory it points into: it sleeps before they do"""
    awake: set[Part] = field(default_factory=set)
    pins: int = 0
    """calls in progress"""
    used: int = 0
    """time of its last work"""
    cause: str = ""
    """resident whose call put it to sleep"""

    def bytes_of(self, parts: set[Part], unknown: int) -> int:
        """Return the bytes of these parts; `unknown` where they are not measured yet."""
        if self.sizes is None:
            return unknown if parts else 0
        return sum(self.sizes[part] for part in parts)

    def measure(self, freed: int) -> None:
        """Take over what a sleep gave back: the last part has what the others do not."""
        if not freed:  # it was not open yet
            return
        awake = [part for part in self.parts if part in self.awake]
        sizes = self.sizes or dict.fromkeys(self.parts, min(freed, self.weights))
        sizes[awake[-1]] = max(freed - sum(sizes[part] for part in awake[:-1]), self.least)
        self.sizes = sizes


class Residents:
    """Those who share a device, and how many bytes of it they hold at once at most.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.residents: dict[str, Resident] = {}
        self._working = 0
        """additional bytes that calls in progress take"""
        self._clock = count(1)
        self._lock = RLock()
        self._next_uses: dict[tuple[str, str], str] = {}
        """first use of a resident after the call of another put it to sleep"""
        self._metrics: dict[str, float] = {}

    def add(self, resident: Resident) -> None:
        """Register one who is on the device from now on, or comes to it at its first use if its size is not known."""
        resident.awake = set(resident.parts if resident.sizes is not None else ())
        resident.used = next(self._clock)
        self.residents[resident.name] = resident

    def remove(self, name: str) -> None:
        """Forget one who has left the device, if it was there."""
        self.residents.pop(name, None)

    @property
    def taken_bytes(self) -> int:
        """Bytes of all who are awake, and of the calls in progress."""
        return self._awake_bytes(0) + self._working

    def _awake_bytes(self, unknown: int) -> int:
        return sum(each.bytes_of(each.awake, unknown) for each in self.residents.values())

    @contextmanager
    def awake(self, *names: str, use: str, part: Part = "all", work: int = 0) -> Iterator[None]:
        """While it is open these residents are awake, and `work` bytes are free for what they compute. Calls nest.

        Args:
            names: residents.
            use: the call, in words: `train the actor`.
            part: what of an engine is needed.
            work: additional bytes that the call takes.

        Raises:
            UsageError: with everyone else asleep it is too much.
        """
        with self._lock:
            chosen = [self.residents[name] for name in names]
            if part == "weights":
                self._drop_caches(chosen, work, use)
            wanted = {each.name: self._asleep_parts(each, part) for each in chosen}
            for each in chosen:
                each.pins += 1
            try:
                self.make_room(sum(each.bytes_of(wanted[each.name], 0) for each in chosen) + work, use, wanted)
                for each in chosen:
                    self._wake(each, wanted[each.name], use)
                self._working += work
                try:
                    yield
                finally:
                    self._working -= work
            finally:
                for each in chosen:
                    each.pins -= 1
                    each.used = next(self._clock)

    def _drop_caches(self, chosen: list[Resident], work: int, use: str) -> None:
        """Put engines to sleep whose cache leaves no room for what must be awake while weights come."""
        staying = [each for each in self.residents.values() if each.pins or each in chosen]
        missing = sum(each.bytes_of(self._asleep_parts(each, "weights"), 0) for each in chosen)
        held = sum(each.bytes_of(each.awake, 0) for each in staying) + self._working
        if held + missing + work > self.budget:
            for each in chosen:
                if "cache" in each.awake and not each.pins:
                    self._sleep(each, use)

    def _asleep_parts(self, resident: Resident, part: Part) -> set[Part]:
        """Return the parts of a resident that must wake for a use of `part`."""
        parts = {each for each in resident.parts if part in ("all", each) or each == "all"}
        return parts - resident.awake

    def make_room(self, size: int, use: str, wanted: Mapping[str, set[Part]] | None = None) -> None:
        """Put the least recently used to sleep until `size` more bytes fit.

        Raises:
            UsageError: they do not fit together with those at work.
        """
        unmeasured = any(self.residents[name].sizes is None and parts for name, parts in (wanted or {}).items())
        while unmeasured or self._awake_bytes(self.budget) + self._working + size > self.budget:
            idle = [each for each in self.residents.values() if each.awake and not each.pins]
            if not idle:
                break
            self._sleep(min(idle, key=lambda each: each.used), use)
        if self.taken_bytes + size > self.budget:
            awake = ", ".join(each.name for each in self.residents.values() if each.awake)
            beside = f" in addition to {self.taken_bytes / GIB:.3g} of {awake}" if awake else ""
            raise UsageError(
                f"no room to {use}: it needs {size / GIB:.3g} GiB of a device{beside}, but the limit is "
                f"{self.budget / GIB:.3g}; raise {run_option('launcher.share_gib')}, or use smaller models or "
                "batches"
            )

    def _wake(self, resident: Resident, parts: set[Part], use: str) -> None:
        """Wake parts of a resident, weights before the cache."""
        if parts and resident.cause:
            self._next_uses[resident.name, resident.cause] = use.split()[0]
            resident.cause = ""
        for part in [each for each in resident.parts if each in parts]:
            started = current_time()
            taken = resident.wake(part)
            resident.awake.add(part)
            if resident.sizes is not None and taken and len(resident.parts) > 1:
                resident.sizes[part] = taken
            self._count(resident.name, current_time() - started, taken)

    def _sleep(self, resident: Resident, use: str) -> None:
        """Put a resident to sleep, and first those who point into its memory.

        Weights that the next use will bring are dropped. The next use is predicted from the last time; at first, an update
        follows training.
        """
        for each in self.residents.values():
            if resident.name in each.follows and each.awake:
                self._sleep(each, use)
        follows = "sync" if use.split()[0] in ("train", "sync") else ""
        expected = self._next_uses.get((resident.name, use), follows)
        started = current_time()
        freed = resident.sleep(2 if expected == "sync" else 1)
        resident.measure(freed)
        resident.awake, resident.cause = set(), use
        self._count(resident.name, current_time() - started, freed)

    def _count(self, name: str, seconds: float, size: int) -> None:
        for metric, value in ((f"sleep/{name}/seconds", seconds), (f"sleep/{name}/gib", size / GIB)):
            self._metrics[metric] = self._metrics.get(metric, 0.0) + value

    def metrics(self) -> dict[str, float]:
        """Return seconds and GiB of the switches since it was last asked, by resident."""
        with self._lock:
            metrics, self._metrics = self._metrics, {}
        return metrics
