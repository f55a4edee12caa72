"""Stopping politely: the first signal lets the step finish and a checkpoint be written, the second stops at once.

SIGHUP            exit code 129: the terminal was closed; ignored where it was ignored before, as under `nohup`
SIGINT (Ctrl-C)   exit code 130
SIGTERM           exit code 143
SIGUSR1           exit code 75 (EX_TEMPFAIL): a batch system's pre-emption notice; requeue and resume

The step and the saving after it have a deadline each (`stop_watch`). Before the first step and after the last there is no step
to finish: SIGUSR1 exits with its code at once, and the others do what they do in any program.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rlhf_core.errors import run_option
from rlhf_core.option_text import OptionNames
from rlhf_core.run.stop_watch import EXIT_CODES, StopWatch
from rlhf_core.util.messages import log

__all__ = ["PreemptionExit", "StopSignals", "exit_on_preemption"]


class PreemptionExit(SystemExit):
    """The end of a process that was asked to make room while no step was running; distinct from other `sys.exit` calls."""


class StopSignals:
    """While the block runs, remembers the first signal and lets the second through.

    Outside the main thread (for example in a notebook's worker) signals keep their handlers.

    Args:
        seconds: for the step at hand, and again for saving.
    """

    def __init__(self, seconds: float) -> None:
        self.watch = StopWatch(seconds, log.warning)
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            taken = [number for number in EXIT_CODES if number != signal.SIGHUP or _is_heeded(number)]
            self._previous = {number: signal.signal(number, self._first) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    @property
    def exit_code(self) -> int:
        """Return the exit code of the process; 0 if it received no signal."""
        return EXIT_CODES[self.received] if self.received is not None else 0

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.watch.exit_code = self.exit_code
        for again in self._previous:  # a second one does what it does in any program
            if again != signal.SIGHUP:  # a closed terminal may send several
                signal.signal(again, signal.default_int_handler if again == signal.SIGINT else signal.SIG_DFL)
        if signal.SIGHUP in self._previous:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        name = "Ctrl-C" if number == signal.SIGINT else self.received.name
        limit = f"{self.watch.seconds:g} s at most for each"
        log.warning(f"{name}: finishing this step, then saving ({limit}); send it again to stop at once")


def _is_heeded(number: signal.Signals) -> bool:
    """Return True unless the parent process set the signal to be ignored."""
    return signal.getsignal(number) != signal.SIG_IGN


@contextmanager
def exit_on_preemption(names: OptionNames) -> Iterator[None]:
    """While the block runs, and `StopSignals` does not, SIGUSR1 ends the process with its exit code.

    Args:
        names: of the user's options, for the message.
    """

    def stop(*_: object) -> None:
        go_on = names.render(run_option("resume", True))
        log.warning(f"SIGUSR1: no step is running, so there is nothing to save; continue with {go_on}")
        raise PreemptionExit(EXIT_CODES[signal.SIGUSR1])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
