"""HTTP/1.1 as the endpoint speaks it: one request at a time on a connection, each part with a deadline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from rlhf_core.data.json_list import has_surrogates, is_text

__all__ = ["HEAD_BYTES", "HEAD_END", "HttpError", "Request", "encode_events", "encode_json", "read_request"]

HEAD_BYTES = 1 << 16
"""The longest head of a request."""
HEAD_END = b"\r\n\r\n"
"""Bytes between the head of a message and its body."""


class HttpError(Exception):
    """A request that is refused.

    Args:
        status: the HTTP status.
        message: for the agent's author.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Request:
    """One request, read whole."""

    method: str
    path: str
    headers: Mapping[str, str]
    """headers by lowercase name"""
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body. Raises `HttpError` if it is no JSON object, or has text that no tokenizer reads."""
        try:
            found = json.loads(self.body)
        except ValueError:
            raise HttpError(400, "the body is not JSON") from None
        except RecursionError:
            raise HttpError(400, "the body is nested too deeply") from None
        if has_surrogates(self.body) and not is_text(found):
            raise HttpError(400, "the body has half of a surrogate pair, which is not valid text; write both halves")
        if not isinstance(found, dict):
            raise HttpError(400, "the body is not a JSON object")
        return found

    @property
    def tokens(self) -> tuple[str, str]:
        """Tokens that the request brings, as OpenAI's clients and as Anthropic's do. The latter may send both."""
        scheme, _, given = self.headers.get("authorization", "").partition(" ")
        return (given.strip() if scheme.lower() == "bearer" else "", self.headers.get("x-api-key", ""))


async def read_request(reader: asyncio.StreamReader, most_bytes: int) -> Request | None:
    """Return the next request of a connection; None at its end.

    Raises:
        HttpError: it is no request that this server reads.
    """
    try:
        head = await reader.readuntil(HEAD_END)
    except asyncio.IncompleteReadError:
        return None
    except asyncio.LimitOverrunError:
        raise HttpError(431, "the header of the request is too long") from None
    first, *lines = head.decode("latin-1").split("\r\n")
    try:
        method, target, _ = first.split(" ")
    except ValueError:
        raise HttpError(400, "this is not an HTTP request") from None
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if "transfer-encoding" in headers:
        raise HttpError(411, "send the body with its Content-Length")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HttpError(400, f"the Content-Length {length!r:.60} is not a number of bytes")
    if len(length) > 18 or int(length) > most_bytes:  # Python converts no text of thousands of digits
        raise HttpError(413, f"the body has {length:.20} bytes, but the limit is {most_bytes}")
    return Request(method, target.partition("?")[0], headers, await reader.readexactly(int(length)))


def encode_json(status: int, content: Any) -> bytes:
    """Return a whole response."""
    return _encode(status, "application/json", json.dumps(content).encode())


def encode_events(events: Iterable[tuple[str, Any]]) -> bytes:
    """Return a response of server-sent events, each a name (empty for none) and what is sent: JSON, or a text as it is."""
    parts = []
    for name, content in events:
        said = content if isinstance(content, str) else json.dumps(content)
        parts.append(f"event: {name}\ndata: {said}\n\n" if name else f"data: {said}\n\n")
    return _encode(200, "text/event-stream; charset=utf-8", "".join(parts).encode())


def _encode(status: int, kind: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("latin-1") + body
