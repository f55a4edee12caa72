"""The process that starts keepers, each a fork of it, so that a sample does not wait for an interpreter to start.

It reads no job: each keeper has its own socket for that.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Any

from rlhf_core.reward.sandbox import confinement, keeper

__all__ = ["SandboxServer", "main"]

START = (
    "import sys; sys.path[:], sys.argv[1:] = sys.argv[1:], []; from rlhf_core.reward.sandbox.server import main; main()"
)
"""The server imports what this process would, regardless of its own environment."""
GRACE = 60.0
"""Seconds that a keeper may take beyond its program's time."""


class SandboxServer:
    """The server as its user sees it: a context, in which any thread may ask for jobs to be done."""

    def __init__(self) -> None:
        self._turn = threading.Lock()

    def __enter__(self) -> SandboxServer:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", START, *filter(None, sys.path)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={
                    "PATH": os.defpath,
                    "HOME": "/tmp",  # noqa: S108  # the folder that it may have for itself
                    "LANG": "C.UTF-8",
                    "MALLOC_ARENA_MAX": "1",  # address space, which is limited, is not reserved for each thread
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "PYTHONHASHSEED": "0",  # the same program gives the same answer
                },
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """End the server and all that it has started."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ask(self, first: dict[str, Any], second: dict[str, Any]) -> Any:
        """Return the answer to a job in two parts (`keeper.main`).

        Raises:
            RuntimeError: there is none; that is not the program's doing.
        """
        deadline = time.monotonic() + first["seconds"] + GRACE
        keeper_number = 0
        ours, theirs = socket.socketpair()
        with ours:
            try:
                with theirs, self._turn:
                    socket.send_fds(self._socket, [b"job"], [theirs.fileno()])
                    keeper_number = int.from_bytes(self._socket.recv(8), "big")
                return json.loads(_exchange(ours, keeper.pack(first) + keeper.pack(second), deadline))
            except (OSError, ValueError) as error:
                with contextlib.suppress(ProcessLookupError):
                    if keeper_number:
                        os.kill(keeper_number, signal.SIGKILL)
                raise RuntimeError(f"reward code: the sandbox gave no answer ({error!r})") from error


def _exchange(connection: socket.socket, data: bytes, deadline: float) -> bytes:
    """Send `data`, and return all that comes back."""
    connection.settimeout(max(deadline - time.monotonic(), 0.01))
    connection.sendall(data)
    answer = bytearray()
    while True:
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        part = connection.recv(1 << 16)
        if not part:
            return bytes(answer)
        answer += part


def main() -> None:
    """Start a keeper for each descriptor that comes in, until the other side ends."""
    confinement.end_with_parent()
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries those that have ended
    gc.freeze()  # so that the children do not copy every page that a collection visits
    while True:
        data, descriptors, *_ = socket.recv_fds(requests, 8, 1)
        if not data:
            return
        child = os.fork()
        if not child:
            break
        os.close(descriptors[0])
        requests.send(child.to_bytes(8, "big"))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    for number in (0, 1):
        os.dup2(descriptors[0], number)
    os.close(descriptors[0])
    keeper.main()
