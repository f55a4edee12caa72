"""A reward server or judge that answers slowly, hugely or with garbage is one line, in the stated time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.errors import UsageError
from rlhf_core.reward.http import Replicas
from rlhf_core.reward.judge import Judge
from rlhf_core.reward.remote import Remote
from rlhf_core.testing import tiny_rollouts
from rlhf_core.util import http

OK = b"HTTP/1.1 200 OK\r\n"


class RawServer:
    """Sends bytes to whoever connects, some at a time."""

    def __init__(self, parts: list[bytes], pause: float = 0.0) -> None:
        self._parts, self._pause = parts, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(5)
                    self._read_request(connection)
                    for part in self._parts:
                        connection.sendall(part)
                        if self._ended.wait(self._pause):
                            return
                except OSError:
                    pass

    @staticmethod
    def _read_request(connection: socket.socket) -> None:
        """Read it whole: closing a connection with unread bytes resets it, and the answer may be lost."""
        with connection.makefile("rb") as file:
            length = 0
            while (line := file.readline()) not in (b"\r\n", b""):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            file.read(length)

    def close(self) -> None:
        self._ended.set()
        self._listener.close()


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    servers: list[RawServer] = []

    def serve(parts: list[bytes], pause: float = 0.0) -> str:
        servers.append(RawServer(parts, pause))
        return servers[-1].url

    yield serve
    for server in servers:
        server.close()


def answer(body: bytes) -> bytes:
    return OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def error_of(url: str, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        Remote((url,), backoff=0.01, tries=1, batch=99, **options)(tiny_rollouts())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


N = len(tiny_rollouts())
GARBAGE = {
    b'{"rewards": [%s]}' % b",".join([b"9" * 400] * N): "a server returned rewards with a number that is too large",
    b'{"rewards": [%s]}' % b",".join([b"9" * 5000] * N): "the answer is not JSON: Exceeds the limit",
    b"[" * 100_000 + b"]" * 100_000: "the answer is nested too deeply",
    b'{"rewards": {"a": 1}}': f"a server returned dict instead of rewards for {N} samples",
    b'{"rewards": 1}': f"a server returned int instead of rewards for {N} samples",
    b'"text"': f"a server returned str instead of rewards for {N} samples",
    b"[]": f"a server returned 0 rewards for {N} samples",
    b'{"rewards": %s, "extra_logs": [1]}'
    % json.dumps([1] * N).encode(): "a server returned extra_logs that are not a dict",
    b'{"rewards": %s, "scores": 5}' % json.dumps([1] * N).encode(): "a server returned int instead of scores",
    b'{"ids": %s}' % json.dumps(["x" * 1000] * 1000).encode(): "a server answered for samples ['xxx",
    b'{"%s": 1}' % (b"k" * 5000): "a server returned a dict without 'rewards': kkk",
    b"\xff\xfe\x00": "the answer is not JSON",
    b"": "the answer is not JSON",
}


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_one_line(body: bytes, serving: Callable[..., str]) -> None:
    assert GARBAGE[body] in error_of(serving([answer(body)]))


def test_the_time_limit_is_that_of_the_whole_answer(serving: Callable[..., str]) -> None:
    """A server that sends a byte now and then never runs into the limit of a socket."""
    slow_head = [OK[:9], *[b"0"] * 600]
    slow_body = [OK + b"Content-Length: 9999\r\n\r\n", *[b" "] * 600]
    slow_error = [b"HTTP/1.1 500 Oh\r\nContent-Length: 9999\r\n\r\n", *[b" "] * 600]
    for parts in (slow_head, slow_body):
        started = time.monotonic()
        assert "no complete answer within 0.5 s" in error_of(serving(parts, pause=0.1), timeout=0.5)
        assert time.monotonic() - started < 30  # of a loaded machine; the server would take 60
    started = time.monotonic()
    assert "500 Oh" in error_of(serving(slow_error, pause=0.1), timeout=0.5)
    assert time.monotonic() - started < 30


def test_the_limit_of_the_socket_may_be_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loaded machine the timer of the whole answer is later than the socket's own limit; the words are the same."""
    whole = http._Deadline
    monkeypatch.setattr(http, "_Deadline", lambda seconds: whole(seconds + 60))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,  # it connects, and never answers
        pytest.raises(TimeoutError, match="no complete answer within 0.2 s"),
    ):
        http.ask_server(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.2)


def test_the_size_of_an_answer_is_bounded(serving: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST", 1 << 20)
    chunks = [OK + b"Transfer-Encoding: chunked\r\n\r\n", *[b"100000\r\n" + b" " * (1 << 20) + b"\r\n"] * 64]
    assert "the answer has more than 1 MiB" in error_of(serving(chunks))


def test_an_answer_in_time_is_read_whole(serving: Callable[..., str]) -> None:
    body = b'{"rewards": [1.5, 2.5]}'
    parts = [OK + b"Content-Length: %d\r\n\r\n" % len(body), body[:9], body[9:]]
    assert Replicas((serving(parts, pause=0.05),), timeout=60).ask({}) == {"rewards": [1.5, 2.5]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"key": "a", "reply": "1"}\n[1]\n', ":2 has no"),
        (b'{"key": "a"}\n', ":1 has no"),
        (b'{"key": 1, "reply": "1"}\n', ":1 has no"),
        (b"7\n", ":1 has no"),
        (b"\xff\n", "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_cache_file_of_other_json_is_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Judge(("http://127.0.0.1:9/",), "m", cache_file=str(tmp_path / "replies.jsonl"))(tiny_rollouts())
    assert f"{tmp_path / 'replies.jsonl'}" in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)
