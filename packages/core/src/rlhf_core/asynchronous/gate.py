"""The gate in front of the rollout engines: one call at a time, and new weights before the next one.

An engine samples while its role trains, but takes new weights only between two calls. Training waits for the call in progress
and for no other, because callers that bring weights go first. With engines that take weights midway it waits for none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_core.util.clock import wait_for

__all__ = ["EngineGate", "NotDue"]


class NotDue(TimeoutError):
    """A call or an iteration was not due in time. A `TimeoutError` of what is called is another matter."""


class EngineGate:
    """Lets one caller at a time through to the engines.

    Args:
        trained: iterations whose weights the engines have.
    """

    def __init__(self, trained: int = 0) -> None:
        self.trained = trained
        self.changed = threading.Condition()
        self._held = False
        self._first = 0
        """callers that wait and go first"""

    @contextmanager
    def sampling(self, may: Callable[[], bool] = lambda: True, seconds: float = float("inf")) -> Iterator[int]:
        """Hold the engines for a call, after all who bring weights; yield the iterations whose weights sample.

        Args:
            may: when the call is due; asked under `changed`.
            seconds: deadline of that.

        Raises:
            NotDue: the call was not due in time.
        """
        with self.changed:
            if not wait_for(self.changed, lambda: not self._held and not self._first and may(), seconds):
                raise NotDue
            self._held = True
        try:
            yield self.trained
        finally:
            self._leave()

    @contextmanager
    def weights(
        self,
        trained: int,
        may: Callable[[], bool] = lambda: True,
        seconds: float = float("inf"),
        midway: bool = False,
    ) -> Iterator[None]:
        """Hold the engines to bring them the weights after iteration `trained`; no call begins meanwhile.

        Args:
            trained: iterations whose weights they are.
            may: when they are due; asked under `changed`.
            seconds: deadline of that.
            midway: do not wait for the call in progress, which continues under the new weights.

        Raises:
            NotDue: the weights were not due in time.
        """
        with self.changed:
            if not wait_for(self.changed, may, seconds):
                raise NotDue
            self._first += 1
        try:
            with self.changed:
                wait_for(self.changed, lambda: midway or not self._held)
            yield
            self.trained = trained
        finally:  # a signal may end the wait, too
            with self.changed:
                self._first -= 1
                self.changed.notify_all()

    def _leave(self) -> None:
        with self.changed:
            self._held = False
            self.changed.notify_all()
