"""Worker processes for code that is slow, bound to one CPU, or may hang: a call that takes too long is killed.

Workers are fresh interpreters that talk over pipes, not forks: a fork of a process that runs torch threads may deadlock,
and spawning through multiprocessing would run the user's main script again. Each has its own process group, so that what
a call itself starts dies with it. They live until `close` or the end of this process, whatever ends it and whatever they
do: on Linux the kernel kills the group when this process's end of a pipe closes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import pickle
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

__all__ = ["Failure", "Workers", "reason"]


@dataclass(frozen=True)
class Failure:
    """A call that gave no result."""

    reason: str
    """one line: the exception, the time that ran out, or how the process died"""


class Workers:
    """Runs one function in `count` processes.

    Args:
        count: processes.
        target: the function, `"module:name"`; arguments and results are pickled.
        prepare: arguments of a first call of `"module:prepare"` in each process, which may take any time (imports).
    """

    def __init__(self, count: int, target: str, prepare: tuple[Any, ...] | None = None) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(target, prepare) for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)
        atexit.register(self.close)

    def map(self, calls: Sequence[tuple[Any, ...]], timeout: float, seed: int = 0) -> list[Any]:
        """The result of each call, or a `Failure`, in order.

        Args:
            calls: arguments, a tuple per call.
            timeout: seconds a call may take; 0 waits for ever.
            seed: of the global random generators; each call begins with its own, whichever process it gets.
        """
        numbered = enumerate(calls, seed)
        with ThreadPoolExecutor(len(self._all)) as threads:
            try:
                return list(threads.map(lambda call: self._call(call, timeout), numbered))
            except BaseException:  # a stop: end the calls that the threads wait for
                self.close()
                raise

    def _call(self, call: tuple[int, tuple[Any, ...]], timeout: float) -> Any:
        worker = self._idle.get()
        try:
            return worker.call(call, timeout)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes; a call after that starts them again."""
        for worker in self._all:
            worker.kill()
        atexit.unregister(self.close)


class _Worker:
    """One process, started at its first call and again after it died."""

    def __init__(self, target: str, prepare: tuple[Any, ...] | None) -> None:
        self._target, self._prepare = target, prepare
        self._process: subprocess.Popen[bytes] | None = None
        self._life = -1
        """the end of a pipe that nothing is written to: while it is open, the process may live"""

    def call(self, seed_and_arguments: tuple[int, tuple[Any, ...]], timeout: float) -> Any:
        new = self._process is None
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if new:
                _send(process.stdin, self._prepare)
                _receive(process.stdout)
            deadline = time.monotonic() + timeout if timeout else None
            _send(process.stdin, seed_and_arguments)
            return _receive(process.stdout, deadline)
        except TimeoutError:
            self.kill()
            return Failure(f"no answer within {timeout:g} s")
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.kill()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Failure(f"the worker process died ({how})")
        except BaseException:
            self.kill()  # half a message may be in the pipe
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        watched, self._life = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._target, os.pathsep.join(sys.path), str(watched)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0", **os.environ},  # the order of sets of texts, the same in every process
            start_new_session=True,
            pass_fds=(watched,),
        )
        os.close(watched)
        return self._process

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._life)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _send(pipe: BinaryIO | Any, message: Any) -> None:
    data = pickle.dumps(message)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: Any, deadline: float | None = None) -> Any:
    """The next message.

    Raises:
        TimeoutError: it is not there by `deadline`.
        EOFError: the other end was closed.
    """
    (length,) = struct.unpack("<Q", _read(pipe, 8, deadline))
    return pickle.loads(_read(pipe, length, deadline))  # noqa: S301  # from the child that we started


def _read(pipe: Any, length: int, deadline: float | None) -> bytes:
    parts: list[bytes] = []
    while length:
        if deadline is not None:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
        part = os.read(pipe.fileno(), min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# inside a worker
# ----------------------------------------------------------------------------------------------------------------------


def _serve(target: str, life: int) -> None:
    """Answer calls until the pipe is closed."""
    _die_when_closed(life)

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a call prints goes to the terminal, not into the answers
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    import_module("numpy")  # here, before the clock of a call starts: its generator is seeded for each
    module, _, name = target.partition(":")
    function = getattr(import_module(module), name)
    prepare = _receive(requests)
    if prepare is not None:
        import_module(module).prepare_worker(*prepare)
    _send(answers, None)
    while True:
        try:
            seed, arguments = _receive(requests)
        except EOFError:
            return
        _seed(seed)
        try:
            result = function(*arguments)
        except BaseException as error:  # of the call: nobody interrupts this process but by killing it
            result = Failure(reason(error))
        _send(answers, result)


def _seed(seed: int) -> None:
    """Seed the global generators; torch's only where a call or its module has imported torch."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # numpy takes 32 bits
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _die_when_closed(life: int) -> None:
    """Have the kernel kill this process group when the other end of the pipe `life` closes, even while C code holds the
    interpreter. (`PR_SET_PDEATHSIG` would kill at the end of the *thread* that started us, and this process alone.)"""
    if sys.platform == "linux":
        fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)


def _die_with_parent(parent: int) -> None:
    """Leave when the parent is gone: where the pipe cannot tell (not on Linux, or a fork of the parent's has it open)."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def reason(error: BaseException) -> str:
    """`line 3: ZeroDivisionError: division by zero`, in one line; the line is the innermost one of the user's file."""
    ours = Path(__file__).parents[1]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if ours not in Path(frame.filename).parents and not frame.filename.startswith("<frozen ")  # Python's own import
    ]
    place = f"line {frames[-1].lineno}: " if frames else ""
    return " ".join(f"{place}{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    sys.path[:] = sys.argv[2].split(os.pathsep)
    sys.modules["rlhf_core.util.worker_processes"] = sys.modules[
        "__main__"
    ]  # so that Failure is one class on both ends
    Failure.__module__ = "rlhf_core.util.worker_processes"
    _serve(sys.argv[1], int(sys.argv[3]))
