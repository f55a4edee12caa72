"""The HTTP server of `serve-reward`: uvicorn with deadlines and bounds for clients that are slow, many or hostile."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rlhf_core.contract.ranges import at_least
from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.exits import leave
from rlhf_core.util.messages import log

__all__ = ["Limits", "bind_address", "serve", "warn_if_open"]


LAST = 5.0
"""Seconds more to close what is left after `Limits.stop_within`."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server."""

    seconds: float = 30.0
    """seconds within which the head of a request must arrive, and then its body"""
    connections: int = 512
    """maximum number of open connections; further ones get status 503"""
    stop_within: float = 10.0
    """seconds that requests in progress have to finish after a signal; the process ends 5 s later"""

    def __post_init__(self) -> None:
        at_least(1, self, "seconds", "connections", "stop_within")


def bind_address(host: str, port: int) -> socket.socket:
    """Return a socket that has an address and does not listen yet: what is wrong with it shows before a model is loaded.

    Raises:
        UsageError: another program has the port, or this machine has no such address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError, TypeError) as error:  # the last: a name that cannot be encoded
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def _cannot_listen(host: str, port: int, error: Exception) -> UsageError:
    """Return the error that names the option at fault."""
    if isinstance(error, OverflowError):
        return UsageError(f"{run_option('port', port)} is not a port: choose one from 0 to 65535")
    of_port = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
    reason = error.strerror if isinstance(error, OSError) else "it is not a host name"
    return UsageError(
        f"cannot listen on {host}:{port}: {reason}; choose another {run_option('port' if of_port else 'host')}"
    )


def serve(app: Any, listener: socket.socket, note: str = "", limits: Limits = Limits()) -> None:
    """Listen until a signal ends it, at most `limits.stop_within` seconds after that.

    Args:
        app: an ASGI application.
        listener: what `bind_address` returned.
        note: shown after the address.
        limits: what clients may cost.

    Raises:
        UsageError: another program has taken the port meanwhile.
    """
    import uvicorn

    host, port = listener.getsockname()[:2]
    try:
        listener.listen(1024)  # before the address is shown: who connects at once waits and is not refused
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    host = f"[{host}]" if ":" in host else host
    print(f"rewards at http://{host}:{port}/get_reward {note}".rstrip(), flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        http=_protocol(limits.seconds),
        ws="none",
        limit_concurrency=limits.connections,
        timeout_graceful_shutdown=max(1, round(limits.stop_within)),
    )

    class Server(uvicorn.Server):  # type: ignore[misc]  # uvicorn is optional, and then unknown to mypy
        interrupted = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.interrupted = sig == signal.SIGINT
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            _leave_within(limits.stop_within + LAST)
            await super().shutdown(sockets)

    server = Server(config)
    server.run(sockets=[listener])
    if server.interrupted:  # uvicorn raises it again, which asyncio forgets where everything has ended by then
        raise KeyboardInterrupt


def _leave_within(seconds: float) -> None:
    """End this process, though the model never returns: Python waits for the thread that it is in."""
    timer = threading.Timer(seconds, leave, [128 + signal.SIGTERM])
    timer.daemon = True
    timer.start()


def warn_if_open(host: str, token: str) -> None:
    """Warn of an address that others reach without a token."""
    if not token and not _is_loopback(host):
        log.warning(f"anyone who can reach {host} can use this server; leave out --token none, or --host")


def _is_loopback(host: str) -> bool:
    """Return True if only this machine reaches the address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol, which closes a connection whose next request has not begun after `seconds`.

    Its own time limit (keep-alive) begins after a first answer, and ends with the first byte of the next request.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):  # type: ignore[misc]  # uvicorn is optional, and then unknown to mypy
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._wait()

        def on_response_complete(self) -> None:
            self._wait()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._late is not None:
                self._late.cancel()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._late is not None:
                self._late.cancel()
            self._late = self.loop.call_later(seconds, self._close_idle)

        def _close_idle(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return Impatient
