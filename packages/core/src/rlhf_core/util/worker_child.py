"""Code that runs inside a worker process (`util.worker_processes`), and the messages between it and its parent.

A message is its length and a pickle. The first one prepares the process; each further one is a seed and a call's arguments.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import random
import signal
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["HEAD", "Failure", "frame", "reason"]

HEAD = struct.Struct("<Q")
"""Format of a message's length, which precedes it."""


@dataclass(frozen=True)
class Failure:
    """A call that gave no result."""

    reason: str
    """one line: the exception, the time that ran out, or how the process died"""


def frame(message: Any) -> bytes:
    """Return a message as it goes through a pipe."""
    data = pickle.dumps(message)
    return HEAD.pack(len(data)) + data


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
        except BaseException as error:  # of the call: this process is only ever killed, not interrupted
            result = Failure(reason(error))
        _send(answers, result)


def _send(pipe: BinaryIO, message: Any) -> None:
    pipe.write(frame(message))
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    """Return the next message.

    Raises:
        EOFError: the other end was closed.
    """
    head = pipe.read(HEAD.size)
    if len(head) < HEAD.size:
        raise EOFError
    (length,) = HEAD.unpack(head)
    return pickle.loads(pipe.read(length))  # noqa: S301  # from the parent that started us


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
    """Leave when the parent is gone: where the pipe does not show it (not on Linux, or a fork of the parent's has it open)."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def reason(error: BaseException) -> str:
    """`line 3: ZeroDivisionError: division by zero`, as one line; the line number is the innermost one of the user's file."""
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
    sys.modules["rlhf_core.util.worker_child"] = sys.modules["__main__"]  # so that Failure is one class on both ends
    Failure.__module__ = "rlhf_core.util.worker_child"
    _serve(sys.argv[1], int(sys.argv[3]))
