"""Running vLLM servers: which of them takes the next request, and which are left alone after a failure."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from rlhf_core.errors import OptionError, option
from rlhf_core.util.http import FAILURES, Refusal, ask_server

__all__ = ["Server", "Servers", "address_towards", "servers_of_rank"]

LEAVE_ALONE = 30.0
"""Seconds before a server that failed is asked again, while others answer."""

LOOK_SECONDS = 10.0
"""Deadline for the answer that shows that a server is there."""


class Server:
    """One server.

    Args:
        url: its address.
        token: sent as a bearer token, if any.
        seconds: deadline of an answer.
    """

    def __init__(self, url: str, token: str, seconds: float) -> None:
        self.url, self.token, self.seconds = url.rstrip("/"), token, seconds
        self.load = 0
        """requests that it has now"""
        self.failed_at = -LEAVE_ALONE
        """time of its last failure"""
        self.is_stale = False
        """True if it lacks the weights that were sent last"""
        self.updates = 0
        """times that it took weights"""

    def ask(self, path: str, question: Any = None, seconds: float | None = None) -> Any:
        """Return its JSON answer; see `ask_server`."""
        return ask_server(f"{self.url}{path}", question, self.token, seconds or self.seconds)

    def describe(self) -> tuple[str, int]:
        """Return its name of the model, and the tokens that a prompt and its completion have at most.

        Raises:
            OptionError: it does not answer as vLLM does.
        """
        try:
            model = self.ask("/v1/models", seconds=LOOK_SECONDS)["data"][0]
            return str(model["id"]), int(model["max_model_len"])
        except Refusal as error:
            hint = f"give {option('token')}" if error.code == 401 else "correct the address"
            raise OptionError("server", f": {self.url} refused: {error}; {hint}") from None
        except FAILURES as error:
            raise OptionError("server", f": no server answers at {self.url}: {error}; start it first") from None
        except (KeyError, TypeError, IndexError):
            raise OptionError("server", f": {self.url} is not a vLLM server; correct the address") from None

    def weight_version(self) -> str | None:
        """Return the name of its weights; None if it does not answer, and nothing if it does not tell."""
        try:
            found = self.ask("/weight_info", seconds=LOOK_SECONDS if self.failed_lately else None)
            return str(found["weight_version"])
        except (Refusal, KeyError, TypeError):
            return ""
        except FAILURES:
            return None

    def note_failure(self) -> None:
        """Leave it alone for a while."""
        self.failed_at = time.monotonic()

    def note_update(self) -> None:
        """Count an update, after which it has the weights that were sent last and takes requests."""
        self.updates += 1
        self.is_stale = False
        self.failed_at = -LEAVE_ALONE

    @property
    def failed_lately(self) -> bool:
        """True if it is left alone."""
        return time.monotonic() - self.failed_at < LEAVE_ALONE


class Servers:
    """Servers that sample the same model.

    Args:
        servers: all of them.
        in_flight: requests that each has at a time.
    """

    def __init__(self, servers: Sequence[Server], in_flight: int) -> None:
        self.all, self.in_flight = list(servers), in_flight
        self._changed = threading.Condition()

    @contextmanager
    def borrow(self) -> Iterator[Server]:
        """Yield the server with the fewest requests, as soon as one has room; those that failed lately come last."""
        with self._changed:
            server = self._next()
            while server.load >= self.in_flight:
                self._changed.wait()  # a request ends by its own deadline
                server = self._next()
            server.load += 1
        try:
            yield server
        finally:
            with self._changed:
                server.load -= 1
                self._changed.notify()

    def _next(self) -> Server:
        return min(self.all, key=lambda each: (each.is_stale or each.failed_lately, each.load))

    @property
    def any_healthy(self) -> bool:
        """True if one is neither left alone nor stale."""
        return not all(each.is_stale or each.failed_lately for each in self.all)


def servers_of_rank(urls: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the servers of this rank: each has the same number to itself, and updates them alone.

    Args:
        urls: of all ranks.
        environment: tells how many ranks a launcher started, and which of them this one is.

    Raises:
        OptionError: the ranks cannot share them evenly.
    """
    ranks, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if len(urls) % ranks:
        raise OptionError(
            "server",
            f"has {len(urls)} addresses, which {ranks} ranks cannot share evenly; give each rank the same number",
        )
    return list(urls[rank::ranks])


def address_towards(url: str) -> str:
    """Return the address of this machine on the way to a server."""
    target = urlsplit(url)
    family, kind, _, _, address = socket.getaddrinfo(target.hostname, target.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # sends nothing
        probe.connect(address)
        return str(probe.getsockname()[0])
