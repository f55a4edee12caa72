"""One question to a server over HTTP: a JSON answer within a deadline and a size limit. Standard library only.

Redirects are refused: they would carry the token elsewhere. An answer is bounded as a whole: by time, from the connection to
its last byte, and by size.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

__all__ = ["FAILURES", "LOOPBACK", "Refusal", "ask_server", "is_address"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LARGEST = 64 << 20
"""Bytes of an answer at most."""
FAILURES = (OSError, http.client.HTTPException, ValueError)
"""Exceptions that a question ends in: no connection, no answer, an answer of an error (`Refusal`), no JSON."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Refusal(OSError):
    """An answer with the status of an error; its text is one line."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        super().__init__(_error_line(error))
        self.code = error.code

    @property
    def is_final(self) -> bool:
        """True if the question itself is refused, so that no other server would answer it either."""
        return self.code < 500 and self.code not in (408, 429)


class _Deadline:
    """Ends the connections made under it when time is up: a socket's own time limit is for each of its bytes."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def add(self, connected: socket.socket) -> None:
        """Watch a connection."""
        with self._lock:
            self._sockets.append(connected)
        if self.over:
            self._end()

    def _end(self) -> None:
        self.over = True
        with self._lock:
            for each in self._sockets:
                with suppress(OSError):  # closed already
                    each.shutdown(socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    deadline: _Deadline

    def connect(self) -> None:
        super().connect()
        self.deadline.add(self.sock)


class _SecureConnection(http.client.HTTPSConnection):
    deadline: _Deadline

    def connect(self) -> None:
        super().connect()
        self.deadline.add(self.sock)


class _DeadlineHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections under a deadline."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make(_Connection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._make(_SecureConnection), req)

    def _make(self, kind: type[_Connection] | type[_SecureConnection]) -> Any:
        def make(host: str, **options: Any) -> http.client.HTTPConnection:
            connection = kind(host, **options)
            connection.deadline = self._deadline
            return connection

        return make


def is_address(url: str) -> bool:
    """Return True if `url` is an address of http or https."""
    return urlsplit(url).scheme in ("http", "https") and bool(urlsplit(url).hostname)


def ask_server(url: str, question: Any = None, token: str = "", timeout: float = 180) -> Any:
    """Return the JSON answer of a server.

    Args:
        url: full address.
        question: sent as JSON by POST; None asks by GET.
        token: sent as a bearer token, if any.
        timeout: seconds from the connection to the last byte of the answer.

    Raises:
        Refusal: the answer has the status of an error.
        OSError: there is no connection, or no whole answer in time.
        http.client.HTTPException: the answer is no HTTP.
        ValueError: the answer is no JSON, or too large.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = None
    if question is not None:
        headers["Content-Type"] = "application/json"
        body = json.dumps(question).encode()
    request = urllib.request.Request(url, body, headers)  # noqa: S310  # callers check `is_address`
    proxies: dict[str, str] | None = (
        {} if urlsplit(url).hostname in LOOPBACK else None
    )  # None: those of the environment
    with _Deadline(timeout) as deadline:
        opener = urllib.request.build_opener(
            _NoRedirects, urllib.request.ProxyHandler(proxies), _DeadlineHandler(deadline)
        )
        try:
            with opener.open(request, timeout=timeout) as response:
                content = response.read(LARGEST + 1)
        except urllib.error.HTTPError as error:
            raise Refusal(error) from None
        except FAILURES as error:  # ValueError: the connection was closed meanwhile
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if deadline.over or isinstance(cause, TimeoutError):  # the socket's own limit may be first
                raise TimeoutError(f"no complete answer within {timeout:g} s") from None
            raise
        if deadline.over:
            raise TimeoutError(f"no complete answer within {timeout:g} s")
    return _parse(content)


def _parse(content: bytes) -> Any:
    """Return the JSON of an answer.

    Raises:
        ValueError: it is none, or too large.
    """
    if len(content) > LARGEST:
        raise ValueError(f"the answer has more than {LARGEST >> 20} MiB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the answer is not JSON: {error}") from None


def _error_line(error: urllib.error.HTTPError) -> str:
    """`401 Unauthorized: …`, in one line."""
    try:
        body = error.read(500).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):  # it ends early
        body = ""
    return " ".join(f"{error.code} {error.reason}: {body}".split())
