"""Background work in a thread: one piece at a time, whose failure is raised in the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Background"]


class Background:
    """Work that was started and must be asked about: by `poll`, which returns at once, or `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._seconds = 0.0
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`; whatever was started before has been waited for."""
        assert self._thread is None, "wait first"

        def run() -> None:
            started = time.perf_counter()
            try:
                work()
            except BaseException as error:  # raised in the loop, by `poll` or `wait`
                self._error = error
            self._seconds = time.perf_counter() - started

        # a daemon, so that a second Ctrl-C ends the process at once; what is half written then has no name yet
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> float:
        """Return the seconds that the work took, once; 0 while it runs or without work. Raises the work's exception."""
        return 0.0 if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self) -> float:
        """Wait until the work has ended, then return its seconds as `poll` does."""
        if self._thread is None:
            return 0.0
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._seconds
