"""Requests to servers over HTTP, with replicas, retries, and a token. Standard library only.

Replicas are asked in turn. One that does not answer is left alone for a while and its question goes to the next, so that
a dead replica costs one failed connection and no reward. Redirects are refused: they would carry the token elsewhere.
An answer is bounded as a whole: by time, from the connection to its last byte, and by size.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from rlhf_core.errors import OptionError

__all__ = ["Replicas"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LEAVE_ALONE = 30.0
"""Seconds before a replica that failed is asked again, while others answer."""
LONGEST_WAIT = 30.0
"""Seconds between two tries at most."""
LARGEST = 64 << 20
"""Bytes of an answer at most."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Refusal(OSError):
    """An answer with the status of an error; its text is one line."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        super().__init__(_error_line(error))
        self.code = error.code


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


class Replicas:
    """Servers that answer the same questions; safe to ask from several threads.

    Args:
        urls: full addresses.
        token: sent as a bearer token, if any.
        timeout: seconds for one answer, from the connection to its last byte.
        tries: how often all of them may fail one question.
        backoff: seconds before the second try, doubled for each further one.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str = "",
        timeout: float = 180,
        tries: int = 5,
        backoff: float = 1,
    ) -> None:
        for url in urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise OptionError("url", f"{url}: expected an address like http://127.0.0.1:5000/get_reward")
        if not urls:
            raise OptionError("url", "needs at least one address")
        self._urls, self._token = list(urls), token
        self._timeout, self._tries, self._backoff = timeout, tries, backoff
        self._lock = threading.Lock()
        self._next = 0
        self._failed_at = dict.fromkeys(self._urls, -LEAVE_ALONE)

    def ask(self, question: Any) -> Any:
        """The JSON answer of one of them.

        Raises:
            UsageError: a server refused the question, or none answered.
        """
        reasons: dict[str, str] = {}
        for attempt in range(self._tries):
            if attempt:
                time.sleep(min(self._backoff * 2 ** (attempt - 1), LONGEST_WAIT))
            for url in self._in_turn():
                try:
                    return self._post(url, question)
                except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no JSON
                    if isinstance(error, _Refusal) and error.code < 500 and error.code != 429:
                        raise OptionError("url", f": {url} refused: {error}") from None
                    reasons[url] = f"{error}"
                    with self._lock:
                        self._failed_at[url] = time.monotonic()
        told = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
        raise OptionError("url", f": no server answered in {self._tries} tries: {told}")

    def _in_turn(self) -> list[str]:
        """All of them, beginning with the next; those that failed lately come last."""
        with self._lock:
            start, self._next = self._next, (self._next + 1) % len(self._urls)
            turned = self._urls[start:] + self._urls[:start]
            lately = time.monotonic() - LEAVE_ALONE
            return sorted(turned, key=lambda url: self._failed_at[url] > lately)

    def _post(self, url: str, question: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(url, json.dumps(question).encode(), headers)  # noqa: S310  # http or https, checked above
        proxies: dict[str, str] | None = (
            {} if urlsplit(url).hostname in LOOPBACK else None
        )  # None: those of the environment
        with _Deadline(self._timeout) as deadline:
            opener = urllib.request.build_opener(
                _NoRedirects, urllib.request.ProxyHandler(proxies), _DeadlineHandler(deadline)
            )
            try:
                with opener.open(request, timeout=self._timeout) as response:
                    content = response.read(LARGEST + 1)
            except urllib.error.HTTPError as error:
                raise _Refusal(error) from None
            except (OSError, http.client.HTTPException, ValueError):  # ValueError: the connection was closed meanwhile
                if deadline.over:
                    raise TimeoutError(f"no whole answer within {self._timeout:g} s") from None
                raise
            if deadline.over:
                raise TimeoutError(f"no whole answer within {self._timeout:g} s")
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
        raise ValueError(f"the answer is no JSON: {error}") from None


def _error_line(error: urllib.error.HTTPError) -> str:
    """`401 Unauthorized: …`, in one line."""
    try:
        body = error.read(500).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):  # it ends early
        body = ""
    return " ".join(f"{error.code} {error.reason}: {body}".split())
