"""The deadline of a polite stop: a run ends although its reward, template or plugin never returns.

Python runs a signal's handler in the main thread, between two bytecodes; a main thread that waits in C for another rank never
gets there. Hence a small separate process keeps the time. The interpreter's wake-up file (`signal.set_wakeup_fd`) brings
it the number of each signal the moment it arrives, whatever the main thread does. From the first signal of a stop

1. the step has `seconds`; then SIGVTALRM has `StopOverdue` raised in the main thread, which unwinds it;
2. after `GRACE` more seconds a second SIGVTALRM ends the process with the signal's exit code, whatever catches exceptions;
3. after `LAST` more seconds, in which no handler ran, SIGKILL does.

`restart` begins a time of `seconds` for what follows the step: the checkpoint, and closing the run. A second signal of a stop
leaves at most `GRACE` seconds. This file is also the program of the watching process: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["EXIT_CODES", "GRACE", "StopOverdue", "StopWatch", "leave_in_time"]

EXIT_CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
"""Signals that stop a run, and what its process then exits with."""
GRACE = 5.0
"""Seconds to unwind once the time is over."""
LAST = 2.0
"""Seconds for the handler to end the process."""
QUIT, RESTART = 0, 255
"""Bytes that are no signal's number."""
_exit = os._exit
"""Python's own function, even while a run replaces it (`util.exits`)."""


class StopOverdue(BaseException):
    """The time for a polite stop is over. No `Exception`, so that plugins that catch those do not catch it."""


class StopWatch:
    """A context manager around a run in the main thread; elsewhere it does nothing.

    Args:
        seconds: for the step at hand, and again for what follows it.
        warn: receives one message if the small process cannot be started; stops then have no deadline.
    """

    def __init__(self, seconds: float, warn: Callable[[str], object] = print) -> None:
        self.seconds, self._warn = seconds, warn
        self.exit_code = 1
        """exit code of the process if it does not unwind"""
        self._process: subprocess.Popen[bytes] | None = None
        self._raised = False

    def __enter__(self) -> StopWatch:
        if threading.current_thread() is threading.main_thread():
            self._raised = False
            reader, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            try:
                self._process = self._start(reader)
            except OSError as error:  # the interpreter may not be executed, or there may be no more processes
                os.close(self._pipe)
                program = sys.executable or "the Python interpreter, whose path is unknown,"
                self._warn(f"stopping the run has no time limit, since {program} cannot be started ({error.strerror})")
                return self
            finally:
                os.close(reader)
            self._alarm_before: Any = signal.signal(signal.SIGVTALRM, self._overdue)
            self._wakeup_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        return self

    def _start(self, reader: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable or "", "-I", "-S", __file__, str(os.getpid()), str(self.seconds)],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
        )

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        self._send(QUIT)
        try:
            self._process.wait(LAST)
        except subprocess.TimeoutExpired:  # the machine is slow
            self._process.kill()
            self._process.wait()
        signal.signal(signal.SIGVTALRM, self._alarm_before)  # now that it is no longer sent
        os.close(self._pipe)
        self._process = None

    def restart(self) -> None:
        """If a stop is under way, begin its time anew."""
        if self._process is not None:
            self._send(RESTART)

    def _send(self, byte: int) -> None:
        with contextlib.suppress(OSError):  # it was killed
            os.write(self._pipe, bytes([byte]))

    def _overdue(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, b"rlhf-run: the run did not end in time and is stopped; nothing else was saved\n")
            _exit(self.exit_code)
        self._raised = True
        raise StopOverdue


def leave_in_time(exit_code: int) -> None:
    """End this process after `GRACE` seconds, though a thread of a plugin never returns: Python waits for those at its end."""
    timer = threading.Timer(GRACE, _exit, [exit_code])
    timer.daemon = True
    timer.start()


def watch(run: int, seconds: float) -> None:
    """Keep the time of the process `run`, which writes to standard input, until it ends."""
    deadline, received, steps = None, False, iter([(signal.SIGVTALRM, GRACE), (signal.SIGVTALRM, LAST)])
    while os.getppid() == run:
        patience = 5.0 if deadline is None else min(5.0, max(0.0, deadline - time.monotonic()))
        if select.select([0], [], [], patience)[0]:
            told = os.read(0, 256)
            if not told or QUIT in told:
                return
            for byte in told:
                now = time.monotonic()
                if byte == RESTART and deadline is not None:
                    deadline = now + seconds
                elif byte in EXIT_CODES:
                    deadline = min(deadline, now + GRACE) if received and deadline is not None else now + seconds
                    received = True
        elif deadline is not None and time.monotonic() >= deadline:
            number, more = next(steps, (signal.SIGKILL, LAST))
            os.kill(run, number)
            deadline = time.monotonic() + more


if __name__ == "__main__":
    for each in EXIT_CODES:
        signal.signal(each, signal.SIG_IGN)  # a batch system signals all processes of a job
    watch(int(sys.argv[1]), float(sys.argv[2]))
