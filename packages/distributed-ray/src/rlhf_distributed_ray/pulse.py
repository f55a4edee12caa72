"""Signs of life. An actor answers `beat` in a separate thread; callers that wait for the actor ask.

A process that is stopped, swapped out or cut off does not answer. One that is in a deadlock answers, and its progress stands
still. Progress is what a run reports of itself inside a step (`rlhf_core.util.activity`), counted.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from rlhf_core.util.activity import activity

__all__ = ["GROUP", "Beating", "Limits", "Pulse"]

GROUP = "pulse"
"""Ray's concurrency group of `beat`: it is answered while the actor works."""
START_SECONDS = 600.0
"""Seconds until the first answer: a new process imports torch, and Ray starts many at once."""
LONGEST = 10.0
"""A call may stand still for so many times the longest call so far."""


@dataclass(frozen=True)
class Limits:
    """Deadlines of calls to actors."""

    patience: float
    """seconds without an answer"""
    stall: float
    """seconds without progress in a call, at the least"""
    timeout: float = 1800.0
    """seconds that ranks wait for each other in a collective operation"""
    placing: float = 60.0
    """seconds that the cluster may take to place everyone"""
    retries: int = 0
    """deaths that the run survives"""
    room: float = 600.0
    """seconds that the run waits for resources for the workers of a lost node"""
    snapshot_every: int = 0
    """steps between two snapshots of roles in memory"""

    @property
    def interval(self) -> float:
        """Seconds between two questions."""
        return min(5.0, max(0.1, min(self.patience, self.stall) / 4))


class Beating:
    """The part of an actor that answers."""

    def __init__(self) -> None:
        self._progress = _Count()

    def count_progress(self) -> None:
        """Count what this process reports of itself from now on."""
        activity.setLevel(logging.DEBUG)
        activity.addHandler(self._progress)

    def beat(self) -> int:
        """Return a number that grows while work is done."""
        return self._progress.number


class _Count(logging.Handler):
    """Counts reports of progress."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.number = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.number += 1


class Pulse:
    """Signs of life of one actor, which the controller reads while it waits for a call.

    Time without checks does not count, so that a controller that was itself stopped blames no worker.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._question: Any = None
        self._known = False
        """it has answered once"""
        self._silent = self._idle = 0.0
        self._progress = -1
        self._looked = time.monotonic()
        self._looking = threading.Lock()
        """two calls to an engine may be waited for at once: one samples while another brings weights"""

    def begin(self) -> None:
        """A call begins."""
        self._silent = self._idle = 0.0
        self._looked = time.monotonic()

    def end(self) -> None:
        """A call was answered, so the actor has started; from now on it has the patience of one that works."""
        self._known = True

    def look(self, actor: Any, longest: float) -> str:
        """Ask for a sign of life, and return why the actor counts as hung; empty while it does not.

        Args:
            actor: the actor.
            longest: seconds that the longest call on it has taken so far.
        """
        with self._looking:
            return self._look(actor, longest)

    def _look(self, actor: Any, longest: float) -> str:
        import ray

        now = time.monotonic()
        passed = min(now - self._looked, 2 * self.limits.interval)
        self._looked = now
        self._silent += passed
        self._idle += passed if self._known else 0.0  # one that has not begun stands still
        if self._question is None:
            self._question = actor.beat.options(concurrency_group=GROUP).remote()
        heard = bool(ray.wait([self._question], timeout=0)[0])
        if heard:
            self._hear(self._question)
        patience = self.limits.patience if self._known else max(START_SECONDS, self.limits.patience)
        if self._silent > patience:
            return f"it sent no heartbeat for {self._silent:.0f} s"
        if heard and self._idle > max(self.limits.stall, LONGEST * longest):
            return f"it made no progress for {self._idle:.0f} s"
        return ""

    def _hear(self, answer: Any) -> None:
        """Take an answer in; that of a dead actor is heard from its call."""
        import ray

        self._question = None
        try:
            progress = ray.get(answer)
        except ray.exceptions.RayError:
            return
        self._known, self._silent = True, 0.0
        if progress != self._progress:
            self._progress, self._idle = progress, 0.0
