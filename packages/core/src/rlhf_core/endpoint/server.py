"""The endpoint over the policy: an HTTP server on loopback, with a URL and a token for each session.

It lives in the event loop of the episodes it serves. Every request has a deadline. A client that goes away cancels its turn,
which then leaves no trace in the episode.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from rlhf_core.contract.driving import EpisodeOver, Policy
from rlhf_core.endpoint.anthropic import answer_messages, count_tokens, encode_error
from rlhf_core.endpoint.conversation import Conversation
from rlhf_core.endpoint.generate import answer_generate
from rlhf_core.endpoint.http import HEAD_BYTES, HEAD_END, HttpError, Request, encode_json, read_request
from rlhf_core.endpoint.openai import answer_chat, answer_completion, describe_model, list_models
from rlhf_core.endpoint.responses import answer_response
from rlhf_core.errors import UsageError
from rlhf_core.util.messages import log

__all__ = ["Address", "Deadlines", "Endpoint"]

BODY_BYTES = 1 << 25
"""The longest body of a request."""
ROUTES = {
    "chat/completions": answer_chat,
    "completions": answer_completion,
    "responses": answer_response,
    "messages": answer_messages,
    "messages/count_tokens": count_tokens,
    "inference/v1/generate": answer_generate,
}
"""Routes of a session, without /v1."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds after which the server gives up."""

    idle: float = 120.0
    """a connection on which no whole request has arrived"""
    transfer: float = 30.0
    """a response that is read too slowly"""
    turn: float = 600.0
    """a turn of the policy"""


@dataclass(frozen=True)
class Address:
    """Address at which a session reaches the policy."""

    base_url: str
    """base URL for OpenAI's clients, …/v1; Anthropic's clients take it without /v1"""
    api_key: str

    @property
    def root_url(self) -> str:
        """The URL without /v1."""
        return self.base_url.removesuffix("/v1")


class _Reader(asyncio.StreamReader):
    """Tells at once that its client has gone."""

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit, loop)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        """The client sends no more."""
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: BaseException) -> None:
        """The connection is lost."""
        super().set_exception(exc)  # type: ignore[arg-type]  # asyncio gives what it caught
        self.gone.set()


class Endpoint:
    """The server of one event loop.

    Args:
        deadlines: of connections and requests.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self._sessions: dict[str, tuple[str, Conversation]] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port of loopback."""
        loop = asyncio.get_running_loop()

        def connect() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(_Reader(limit=HEAD_BYTES, loop=loop), self._serve, loop=loop)

        self._server = await loop.create_server(connect, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no more, and drop all connections."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    @asynccontextmanager
    async def session(self, policy: Policy, strict: bool = True) -> AsyncIterator[Address]:
        """Serve `policy` under a separate URL and token while the context is open.

        Args:
            policy: that of an episode.
            strict: refuse requests whose sampling options differ from those that the policy is trained with.
        """
        name, key = secrets.token_hex(8), secrets.token_urlsafe(24)
        self._sessions[name] = (key, Conversation(policy, strict))
        try:
            yield Address(f"http://127.0.0.1:{self.port}/{name}/v1", key)
        finally:
            del self._sessions[name]

    async def _serve(self, reader: Any, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after another."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the client is gone, or was too slow: its turn was cancelled, and there is no one to notify
        except asyncio.CancelledError:
            pass  # `close` ends the connection
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await writer.wait_closed()

    async def _exchange(self, reader: _Reader, writer: asyncio.StreamWriter) -> bool:
        """Read one request and answer it; return False at the connection's end."""
        try:
            async with asyncio.timeout(self.deadlines.idle):
                request = await read_request(reader, BODY_BYTES)
        except HttpError as error:
            writer.write(_encode_error(error, "v1/"))
            await self._drain(writer)
            return False
        if request is None:
            return False
        response = await self._while_there(reader, self._respond(request))
        if request.method == "HEAD":
            response = response.partition(HEAD_END)[0] + HEAD_END
        writer.write(response)
        await self._drain(writer)
        return request.headers.get("connection", "").lower() != "close"

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self.deadlines.transfer):
            await writer.drain()

    async def _while_there(self, reader: _Reader, work: Coroutine[Any, Any, bytes]) -> bytes:
        """Wait for a response as long as the client does; raise `ConnectionError` if it goes away."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(reader.gone.wait())
        try:
            await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ConnectionAbortedError("the client disconnected")
            return task.result()
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _respond(self, request: Request) -> bytes:
        """Return the response to a request, an error included."""
        name, _, route = request.path.lstrip("/").partition("/")
        try:
            key, conversation = self._sessions.get(name, ("", None))
            if conversation is None:
                raise HttpError(410, "no such session, or its episode is over", "episode_over")
            if not any(hmac.compare_digest(each.encode(), key.encode()) for each in request.tokens):
                raise HttpError(401, "the token of the session is missing or wrong", "invalid_api_key")
            async with asyncio.timeout(self.deadlines.turn):
                return await _route(request, route.removeprefix("v1/"), conversation)
        except HttpError as error:
            return _encode_error(error, route)
        except EpisodeOver as over:
            code = "context_length_exceeded" if over.finish == "length" else "episode_over"
            return _encode_error(HttpError(400, str(over), code), route)
        except UsageError as error:
            return _encode_error(HttpError(400, str(error)), route)
        except TimeoutError:
            late = f"the policy's turn took longer than {self.deadlines.turn:g} s"
            return _encode_error(HttpError(504, late, "timeout"), route)
        except Exception as error:
            log.exception("the endpoint failed on %s %s", request.method, route)
            return _encode_error(HttpError(500, f"{type(error).__name__}: {error}", "internal"), route)


async def _route(request: Request, route: str, conversation: Conversation) -> bytes:
    """Answer a request of a session."""
    if request.method == "GET" and route == "models":
        return list_models()
    if request.method == "GET" and route.startswith("models/"):
        return describe_model(unquote(route.removeprefix("models/")))
    if (answer := ROUTES.get(route)) is None:
        raise HttpError(404, f"unknown route {route!r}; routes are {', '.join(ROUTES)}", "not_found")
    if request.method != "POST":
        raise HttpError(405, f"{request.method} is not supported; send a POST request", "method")
    return await answer(conversation, request.json())


def _encode_error(error: HttpError, route: str) -> bytes:
    """Return an error in the form of the route's clients."""
    if "messages" in route.split("/"):
        return encode_error(error.status, str(error))
    content = {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.code}
    return encode_json(error.status, {"error": content})
