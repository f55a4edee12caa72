"""Worker processes for code that is slow, bound to one CPU, or may hang: a call that takes too long is killed.

Workers are fresh interpreters that talk over pipes, not forks: a fork of a process that runs torch threads may deadlock,
and spawning through multiprocessing would run the user's main script again. Each has its own process group, so that what
a call itself starts dies with it. They live until `close` or the end of this process, whatever ends it and whatever they
do: on Linux the kernel kills the group when this process's end of a pipe closes. They run `util.worker_child`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rlhf_core.util.worker_child import HEAD, Failure, frame, reason

__all__ = ["Failure", "Workers", "reason"]

CHILD = "rlhf_core.util.worker_child"
"""Module that a process runs."""


class Workers:
    """Runs one function in `count` processes.

    Args:
        count: processes.
        target: the function, `"module:name"`; arguments and results are pickled.
        prepare: arguments of a first call of `"module:prepare"` in each process, which may take any time (imports).
    """

    def __init__(self, count: int, target: str, prepare: tuple[Any, ...] | None = None) -> None:
        self._all = [_Worker(target, prepare) for _ in range(count)]
        self._lock = threading.Lock()
        atexit.register(self.close)

    def map(self, calls: Sequence[tuple[Any, ...]], timeout: float, seed: int = 0) -> list[Any]:
        """Return the result of each call, or a `Failure`, in order. One `map` runs at a time.

        Args:
            calls: arguments, a tuple per call. A process takes the next call when it has answered one, so that slow calls
                delay no others.
            timeout: seconds a call may take; 0 waits for ever.
            seed: of the global random generators; each call begins with its own, whichever process it gets.
        """
        with self._lock:
            try:
                return _Dispatch(self._all, calls, timeout, seed).run()
            except BaseException:  # a stop: end the calls that are being waited for
                self.close()
                raise

    def close(self) -> None:
        """End all processes; a call after that starts them again."""
        for worker in self._all:
            worker.kill()
        atexit.unregister(self.close)


class _Dispatch:
    """The calls of one `map`, dealt out as processes become free.

    A quick call is sent before the one in front of it is answered, so that no process waits for this one. Calls are taken
    for quick if the last ones were: a slow one is forgotten after a few quick ones. At most half of an even share of the
    calls that are left waits at a process, so that the last ones, which may be slow, find idle ones. The order of sending
    cannot change a result.

    Args:
        workers: the processes.
        calls, timeout, seed: see `Workers.map`.
    """

    AHEAD_SECONDS = 0.005
    """work that is sent ahead to a process: more than the time until it would get its next call otherwise"""
    AHEAD_CALLS = 16
    """calls that are sent ahead at most"""
    NEIGHBORS = 8
    """adjacent calls of which no two wait at one process, if there are so many processes"""

    def __init__(self, workers: Sequence[_Worker], calls: Sequence[tuple[Any, ...]], timeout: float, seed: int) -> None:
        self._workers = workers[: len(calls)]
        self._calls, self._timeout, self._seed = calls, timeout, seed
        self._waiting = deque(range(len(calls)))
        self._results: dict[int, Any] = {}
        self._pace = self.AHEAD_SECONDS
        """seconds of a slow call, halved with each quicker one since; until one is answered, nothing is sent ahead"""
        self._answered = False

    def run(self) -> list[Any]:
        """Return the results in order."""
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            for worker in self._workers:
                worker.end_if_dead()
                self._feed(worker)
            while len(self._results) < len(self._calls):
                for key, _ in selector.select(self._patience()):
                    self._exchange(key.data)
                self._kill_late()
                if all(worker.process is None for worker in self._workers):  # closed by another thread
                    return [self._results.get(i, Failure("the processes were ended")) for i in range(len(self._calls))]
        return [self._results[number] for number in range(len(self._calls))]

    def _feed(self, worker: _Worker) -> None:
        """Send the next calls to a process that has room for them."""
        share = len(self._waiting) // (2 * len(self._workers))
        ahead = min(share, self.AHEAD_CALLS, int(self.AHEAD_SECONDS / self._pace)) if self._answered else 0
        while self._waiting and len(worker.calls) < 1 + ahead:
            number = self._next_for(worker)
            if number is None:
                break
            self._waiting.remove(number)
            if worker.process is None:
                worker.start()
            if not self._watches(worker.output):
                self._selector.register(worker.output, selectors.EVENT_READ, worker)
            if not worker.calls:
                worker.began = time.monotonic()
            worker.calls.append(number)
            worker.outbox += frame((self._seed + number, self._calls[number]))
        self._write(worker)

    def _next_for(self, worker: _Worker) -> int | None:
        """Return a call for a process; None if each is a neighbor of one that waits there.

        Neighbors may be slow together, such as those of the completions of a prompt.
        """
        apart = min(len(self._workers), self.NEIGHBORS)
        return next((n for n in self._waiting if all(abs(n - held) >= apart for held in worker.calls)), None)

    def _write(self, worker: _Worker) -> None:
        """Send as much as the pipe takes; watch for room if that is not all."""
        try:
            worker.write()
        except BrokenPipeError:
            self._bury(worker)
            return
        if worker.process is None:
            return
        if bool(worker.outbox) != self._watches(worker.input):
            if worker.outbox:
                self._selector.register(worker.input, selectors.EVENT_WRITE, worker)
            else:
                self._selector.unregister(worker.input)

    def _exchange(self, worker: _Worker) -> None:
        """Take the answers of a process, and send it as much as it has room for."""
        if worker.process is None:  # buried while other events of it were at hand
            return
        try:
            answers = worker.read()
        except EOFError:
            self._bury(worker)
            return
        for answer in answers:
            now = time.monotonic()
            if worker.ready:
                seconds = now - worker.began
                self._pace = max(self._pace / 2 if self._answered else 0.0, seconds, 1e-6)
                self._answered = True
                self._results[worker.calls.popleft()] = answer
            worker.ready, worker.began = True, now
        self._feed(worker)

    def _bury(self, worker: _Worker, why: str = "") -> None:
        """End a process whose present call fails; the calls behind it go to others."""
        for end in (worker.input, worker.output):
            if self._watches(end):
                self._selector.unregister(end)
        if worker.calls:
            self._results[worker.calls.popleft()] = Failure(why or worker.cause_of_death())
            self._waiting.extendleft(reversed(worker.calls))
        worker.kill()
        self._feed(worker)

    def _kill_late(self) -> None:
        """End the processes whose call has taken too long."""
        if self._timeout:
            for worker in self._workers:
                if worker.ready and worker.calls and time.monotonic() >= worker.began + self._timeout:
                    self._bury(worker, f"no answer within {self._timeout:g} s")

    def _patience(self) -> float:
        """Return the seconds until the first call is late, at most one: another thread may end the processes."""
        running = [worker.began for worker in self._workers if worker.ready and worker.calls]
        if not self._timeout or not running:
            return 1.0
        return min(1.0, max(0.0, min(running) + self._timeout - time.monotonic()))

    def _watches(self, end: int) -> bool:
        return end in self._selector.get_map()


class _Worker:
    """One process, started at its first call and again after it died."""

    def __init__(self, target: str, prepare: tuple[Any, ...] | None) -> None:
        self._target, self._prepare = target, prepare
        self.process: subprocess.Popen[bytes] | None = None
        self.input = self.output = -1
        """ends of its pipes, which never block"""
        self.ready = False
        """True once it has imported what calls need"""
        self.calls: deque[int] = deque()
        """numbers of the calls that it has not answered, the present one first"""
        self.began = 0.0
        """start time of the current call"""
        self.outbox, self.inbox = bytearray(), bytearray()
        """bytes that are not yet sent, and those that are no whole message yet"""
        self._life = -1
        """the end of a pipe that nothing is written to: while it is open, the process may live"""

    def start(self) -> None:
        """Start the process, and let it prepare."""
        watched, self._life = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", CHILD, self._target, os.pathsep.join(sys.path), str(watched)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0", **os.environ},  # the order of sets of texts, the same in every process
            start_new_session=True,
            pass_fds=(watched,),
        )
        os.close(watched)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin.fileno(), self.process.stdout.fileno()
        for end in (self.input, self.output):
            os.set_blocking(end, False)
        self.outbox[:] = frame(self._prepare)

    def end_if_dead(self) -> None:
        """Forget a process that ended while it had no call, which is no call's fault."""
        if self.process is not None and self.process.poll() is not None:
            self.kill()

    def write(self) -> None:
        """Send what the pipe takes now.

        Raises:
            BrokenPipeError: the process has ended.
        """
        with contextlib.suppress(BlockingIOError):
            while self.outbox:
                del self.outbox[: os.write(self.input, self.outbox[: 1 << 20])]

    def read(self) -> list[Any]:
        """Return the messages that are whole by now.

        Raises:
            EOFError: the other end was closed.
        """
        try:
            while part := os.read(self.output, 1 << 20):
                self.inbox += part
                if len(part) < 1 << 16:
                    break
            if not part:
                raise EOFError
        except BlockingIOError:
            pass
        messages, at = [], 0
        while len(self.inbox) >= at + HEAD.size:
            (length,) = HEAD.unpack_from(self.inbox, at)
            if len(self.inbox) < at + HEAD.size + length:
                break
            at += HEAD.size
            messages.append(pickle.loads(self.inbox[at : at + length]))  # noqa: S301  # from the child that we started
            at += length
        del self.inbox[:at]
        return messages

    def cause_of_death(self) -> str:
        """Say how the process ended."""
        assert self.process is not None
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the worker process died ({how})"

    def kill(self) -> None:
        """End the process with all that it started."""
        process, self.process = self.process, None
        self.ready = False
        for held in (self.calls, self.outbox, self.inbox):
            held.clear()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._life)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
