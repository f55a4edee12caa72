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
LINE_END = b"\r\n"


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
    path = target.partition("?")[0]
    if "transfer-encoding" in headers:
        if headers["transfer-encoding"].lower() != "chunked":
            raise HttpError(
                501, f"Transfer-Encoding {headers['transfer-encoding']!r:.60} is not supported; send chunked"
            )
        return Request(method, path, headers, await _read_chunks(reader, most_bytes))
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HttpError(400, f"the Content-Length {length!r:.60} is not a number of bytes")
    if len(length) > 18 or int(length) > most_bytes:  # Python converts no text of thousands of digits
        raise HttpError(413, f"the body has {length:.20} bytes, but the limit is {most_bytes}")
    return Request(method, path, headers, await reader.readexactly(int(length)))


async def _read_chunks(reader: asyncio.StreamReader, most_bytes: int) -> bytes:
    """Return a body that comes in chunks, whose length nobody knows before (RFC 9112, section 7.1)."""
    body = bytearray()
    while size := await _read_size(reader):
        if len(body) + size > most_bytes:
            raise HttpError(413, f"the body has more bytes than the limit of {most_bytes}")
        body += await reader.readexactly(size)
        if await reader.readexactly(2) != LINE_END:
            raise HttpError(400, "a chunk of the body is longer than its size")
    while await _read_line(reader):
        pass  # fields after the body
    return bytes(body)


async def _read_size(reader: asyncio.StreamReader) -> int:
    """Return the size of the next chunk."""
    size = (await _read_line(reader)).partition(b";")[0].strip()
    if not 0 < len(size) <= 8 or not set(size) <= set(b"0123456789abcdefABCDEF"):
        raise HttpError(400, f"the size {size[:20].decode('latin-1')!r} of a chunk is not a hexadecimal number")
    return int(size, 16)


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(LINE_END)).removesuffix(LINE_END)
    except asyncio.LimitOverrunError:
        raise HttpError(400, "a line between the chunks of the body is too long") from None


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
