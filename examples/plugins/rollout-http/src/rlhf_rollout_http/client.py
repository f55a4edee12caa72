"""One request to a server, within a deadline and a size limit. Standard library only."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rlhf_core import OptionError, RunStopped, run_option

__all__ = ["LOOPBACK", "Client"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECT_SECONDS = 10.0
REASON = 200  # characters of a server's own words in a message


@dataclass(frozen=True)
class Client:
    """Asks one server.

    Redirects are not followed and proxies are not asked: both would carry token and weights elsewhere.
    """

    url: str
    token: str = field(repr=False)
    timeout: float
    """seconds from the start of a request to the last byte of its answer"""
    max_answer: int
    """bytes"""

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Any:
        """Return the JSON object that the server answers with.

        Raises:
            OptionError: the server refused the token or the request.
            RunStopped: no server, no answer in time, or an answer that is no JSON object.
        """
        expired = threading.Event()
        try:
            status, answer = self._exchange(method, path, body, kind, expired)
        except (OSError, http.client.HTTPException) as error:
            cause = (
                f"gave no answer in {self.timeout:g} s" if expired.is_set() else f"cannot be reached: {_line(error)}"
            )
            raise self.stopped(cause) from None
        if expired.is_set():
            raise self.stopped(f"gave no answer in {self.timeout:g} s")
        if len(answer) > self.max_answer:
            raise self.stopped(f"answered with more than {self.max_answer >> 20} MiB")
        if status == 401:
            raise OptionError("token", f": the rollout engine http at {self.url} refused it")
        reason = " ".join(answer[: 2 * REASON].decode("utf-8", "replace").split())[:REASON]
        if 400 <= status < 500:
            raise OptionError(
                "url", f": the rollout engine http at {self.url} refused {method} {path}: {status} {reason}"
            )
        if status != 200:
            raise self.stopped(f"failed at {method} {path}: {status} {reason}")
        return self._object(answer)

    def stopped(self, cause: str) -> RunStopped:
        """Return the error that names this engine and how to continue."""
        again = f"start it again and continue with {run_option('resume', True)}"
        return RunStopped(f"the rollout engine http at {self.url} {cause}; {again}")

    def _exchange(self, method: str, path: str, body: bytes, kind: str, expired: threading.Event) -> tuple[int, bytes]:
        """Send a request and read its answer, one byte past the limit at most. A timer ends it at the deadline."""
        address = urlsplit(self.url)
        https = address.scheme == "https"
        connect = http.client.HTTPSConnection if https else http.client.HTTPConnection
        connection = connect(str(address.hostname), address.port, timeout=min(self.timeout, CONNECT_SECONDS))
        headers = {"Content-Type": kind, "Authorization": f"Bearer {self.token}"}
        try:
            connection.connect()
            wire = connection.sock
            wire.settimeout(self.timeout)
            timer = threading.Timer(self.timeout, _cut, (wire, expired))
            timer.daemon = True
            timer.start()
            try:
                connection.request(method, address.path.rstrip("/") + path, body, headers)
                response = connection.getresponse()
                return response.status, response.read(self.max_answer + 1)
            finally:
                timer.cancel()
        finally:
            connection.close()

    def _object(self, answer: bytes) -> dict[str, Any]:
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.stopped(f"answered with no JSON object: {answer[:40]!r}")
        return found


def _cut(wire: socket.socket, expired: threading.Event) -> None:
    """End whatever waits for `wire`."""
    expired.set()
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
