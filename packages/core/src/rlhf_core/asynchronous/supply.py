"""Iterations as the loop takes them: collected when it asks, or by a thread that is some iterations ahead of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, TypeVar

from rlhf_core.asynchronous.gate import NotDue
from rlhf_core.asynchronous.queue import IterationQueue
from rlhf_core.util.clock import current_time, start, wait_for

__all__ = ["AheadSupply", "InTurn"]

Thing = TypeVar("Thing")


class InTurn(Generic[Thing]):
    """Collects an iteration when the loop asks for it.

    Args:
        collect: returns the iteration of that number.
        trained: iterations that were trained on before.
    """

    def __init__(self, collect: Callable[[int], Thing], trained: int = 0) -> None:
        self._collect, self._number = collect, trained

    def take(self) -> Thing:
        """Return the next iteration. Raises what goes wrong in collecting it."""
        self._number += 1
        return self._collect(self._number)

    def pause(self) -> AbstractContextManager[None]:
        """While it is open, nothing is collected."""
        return nullcontext()

    def close(self) -> None:
        """Hold nothing."""


class AheadSupply(Generic[Thing]):
    """Collects iterations in order in its own thread, as far ahead as the queue allows.

    Args:
        collect: returns the iteration of that number; only the thread calls it, from the first `take` on.
        queue: decides what may begin.
        changed: guards and announces every change; shared with the code that decides when collecting is due.
        may_begin: True if the iteration of that number is due; asked under `changed`.
        take_seconds: deadline for the next iteration when the loop asks for it.
        close_seconds: deadline for the call in progress when the supply is closed.
    """

    def __init__(
        self,
        collect: Callable[[int], Thing],
        queue: IterationQueue,
        changed: threading.Condition,
        may_begin: Callable[[int], bool] = lambda _: True,
        take_seconds: float = float("inf"),
        close_seconds: float = 60.0,
    ) -> None:
        self._collect, self._queue, self._changed = collect, queue, changed
        self._may_begin, self._take_seconds, self._close_seconds = may_begin, take_seconds, close_seconds
        self._ready: deque[Thing] = deque()
        self._failure: BaseException | None = None
        self._taken = queue.trained
        self._pauses = 0
        self._closed = self._ended = False
        self.idle_seconds = 0.0
        """time that the thread waited before the iteration that it collects now"""
        self.waited_seconds = 0.0
        """time that the loop waited for the iteration that it took last"""
        self._started = False

    def take(self) -> Thing:
        """Return the next iteration; the one before it has been trained on.

        Raises what went wrong in collecting it, and `NotDue` at the deadline.
        """
        began = current_time()
        if not self._started:
            self._started = True
            start(self._run, "sampling ahead")
        with self._changed:
            if self._taken > self._queue.trained:
                self._queue.train()
                self._changed.notify_all()
            if not wait_for(self._changed, lambda: bool(self._ready) or self._ended, self._take_seconds):
                raise NotDue
            self.waited_seconds = current_time() - began
            if not self._ready:
                assert self._failure is not None, "the loop asks for more iterations than the run has"
                raise self._failure
            self._taken += 1
            return self._ready.popleft()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """While it is open, nothing is collected; the iteration in progress is waited for."""
        with self._changed:
            self._pauses += 1
        try:
            with self._changed:
                wait_for(self._changed, lambda: self._queue.sampled == self._queue.begun or self._ended)
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Collect no more, and wait for the call in progress until the deadline; a second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            wait_for(self._changed, lambda: self._ended or not self._started, self._close_seconds)

    def _run(self) -> None:
        try:
            while (number := self._begin()) is not None:
                thing = self._collect(number)
                with self._changed:
                    self._queue.complete()
                    self._ready.append(thing)
                    self._changed.notify_all()
        except BaseException as error:  # raised where the loop asks for the iteration
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _begin(self) -> int | None:
        """Return the number of the next iteration when it may begin; None at the end."""
        began = current_time()
        with self._changed:
            wait_for(self._changed, self._is_due)
            self.idle_seconds = current_time() - began
            if self._closed or self._queue.begun == self._queue.last:
                return None
            return self._queue.begin()

    def _is_due(self) -> bool:
        queue = self._queue
        over = self._closed or queue.begun == queue.last
        return over or (not self._pauses and queue.may_begin and self._may_begin(queue.begun + 1))
