"""Time and waiting, real or simulated: all code sleeps and waits for other threads here.

In simulated time one thread runs at a time. When all of them sleep or wait, the clock jumps to the earliest moment at which one
of them wakes up. So the same program gives the same times on every machine, and an hour of sleeping passes at once.

    with simulated_time() as clock:
        start(other); sleep(3600.0)
    assert clock.current_time() == 3600.0
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Clock", "Deadlock", "SimulatedClock", "current_time", "simulated_time", "sleep", "start", "wait_for"]

SLICE_SECONDS = 1.0
"""A real wait looks up this often, so that a signal is seen on every system."""


class Deadlock(RuntimeError):
    """Every simulated thread waits for another one."""


class Clock(Protocol):
    """A source of time."""

    def current_time(self) -> float:
        """Return the seconds since some moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return after so many seconds."""
        ...

    def wait_for(self, condition: threading.Condition, predicate: Callable[[], bool], seconds: float) -> bool:
        """Return the predicate's value when it is true or so many seconds are over. The caller holds the condition."""
        ...

    def start(self, run: Callable[[], None], name: str) -> threading.Thread:
        """Return a daemon thread that has begun to run."""
        ...


class RealClock(Clock):
    """The time of the machine."""

    def current_time(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait_for(self, condition: threading.Condition, predicate: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not predicate():
            left = end - time.monotonic()
            if left <= 0:
                return False
            condition.wait(min(left, SLICE_SECONDS))
        return True

    def start(self, run: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread


@dataclass
class _Waiter:
    """A thread that does not run."""

    ready: Callable[[], bool]
    wakes: float
    """time at which it runs whether it is ready or not"""


class SimulatedClock(Clock):
    """Time that passes only while all threads sleep or wait. Threads are chosen in the order in which they began to wait."""

    def __init__(self) -> None:
        self._now = 0.0
        self._turn = threading.Condition()
        self._running: _Waiter | None = None
        self._waiting: list[_Waiter] = []
        self._failed = False

    def current_time(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._give_way(_Waiter(lambda: False, self._now + seconds))

    def wait_for(self, condition: threading.Condition, predicate: Callable[[], bool], seconds: float) -> bool:
        if predicate():
            return True
        condition.release()
        try:
            self._give_way(_Waiter(predicate, self._now + seconds))
        finally:
            condition.acquire()
        return predicate()

    def start(self, run: Callable[[], None], name: str) -> threading.Thread:
        entry = _Waiter(lambda: True, self._now)

        def body() -> None:
            self._await_turn(entry)
            try:
                run()
            finally:
                self._choose_next()

        with self._turn:
            self._waiting.append(entry)
        thread = threading.Thread(target=body, name=name, daemon=True)
        thread.start()
        return thread

    def _give_way(self, entry: _Waiter) -> None:
        """Let others run until `entry` is due."""
        with self._turn:
            self._waiting.append(entry)
        self._choose_next()
        self._await_turn(entry)

    def _await_turn(self, entry: _Waiter) -> None:
        with self._turn:
            while self._running is not entry and not self._failed:
                self._turn.wait(SLICE_SECONDS)
            if self._failed:
                raise Deadlock("every simulated thread waits for another one")

    def _choose_next(self) -> None:
        """Hand over to a thread that is ready, else to the one that wakes up first."""
        with self._turn:
            chosen = next((each for each in self._waiting if each.ready()), None)
            if chosen is None and self._waiting:
                chosen = min(self._waiting, key=lambda each: each.wakes)
                self._failed = math.isinf(chosen.wakes)
                self._now = max(self._now, chosen.wakes) if not self._failed else self._now
            if chosen is not None:
                self._waiting.remove(chosen)
            self._running = chosen
            self._turn.notify_all()


_clock: Clock = RealClock()


def current_time() -> float:
    """Return the time of the clock in force, in seconds since some moment."""
    return _clock.current_time()


def sleep(seconds: float) -> None:
    """Return after so many seconds of the clock in force."""
    if seconds > 0:
        _clock.sleep(seconds)


def wait_for(condition: threading.Condition, predicate: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Return the predicate's value when it is true or `seconds` are over. The caller holds `condition`."""
    return _clock.wait_for(condition, predicate, seconds)


def start(run: Callable[[], None], name: str) -> threading.Thread:
    """Return a daemon thread that has begun to run `run`."""
    return _clock.start(run, name)


@contextmanager
def simulated_time() -> Iterator[SimulatedClock]:
    """While it is open, time is simulated in the whole process."""
    global _clock
    before, clock = _clock, SimulatedClock()
    _clock = clock
    try:
        yield clock
    finally:
        _clock = before
