"""`rlhf-run serve-reward` as it is typed: it starts, answers who has the token, and ends; a mistake is one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from test_reward_model import saved

from rlhf_core.cli import main
from rlhf_core.contract.engines import open_provider
from rlhf_core.reward.model import RewardModel

__all__ = ["saved"]  # a fixture

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

TEXTS = ["What is tea? A drink.", "a"]
PROMPTS = [[{"role": "user", "content": "What is tea?"}], "Hi"]
ANSWERS = ["A drink.", "Why?"]


class Served:
    """The command in a process of its own, and the line that it begins with."""

    def __init__(self, model: str, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "rlhf_core", "serve-reward", model, "--port", "0", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline().split()
        assert self.line[:2] == ["rewards", "at"], self.process.communicate()[1]
        self.url = self.line[2]

    def post(self, body: Any, token: str = "") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self, number: signal.Signals) -> tuple[str, str]:
        """Send a signal and return what the process still printed, on both streams."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=120)


@pytest.fixture(scope="module")
def served(saved: tuple[str, str]) -> Iterator[Served]:
    """The command with a token from the environment, and scores that are normalized."""
    server = Served(saved[0], "--token", "env:KEY", "--mean", "0.5", "--std", "2", KEY="secret")
    yield server
    server.process.kill()
    server.process.communicate()


def test_it_answers_with_the_models_scores(served: Served, saved: tuple[str, str]) -> None:
    with open_provider(RewardModel(saved[0], mean=0.5, std=2.0)) as engine:
        plain = engine.score(TEXTS, [None, None])[0].tolist()
        chats = engine.score(PROMPTS, ANSWERS)[0].tolist()
    code, answer = served.post({"query": TEXTS, "prompts": ["", ""], "labels": [None, None]}, "secret")
    assert code == 200 and answer["rewards"] == pytest.approx(plain, abs=1e-5) == answer["scores"]
    body = {"query": ["x", "y"], "raw_prompts": PROMPTS, "completions": ANSWERS, "ids": [7, 8]}
    code, answer = served.post(body, "secret")
    assert answer["rewards"] == pytest.approx(chats, abs=1e-5) and answer["ids"] == [7, 8]
    assert plain != pytest.approx(chats, abs=1e-3), "two requests that could be told apart"


def test_it_answers_nobody_without_the_token_and_does_not_show_a_given_one(served: Served) -> None:
    assert len(served.line) == 3, "no token in the line"
    for token in ("", "guess", "secre", "secret2"):
        assert served.post({"query": TEXTS}, token)[0] == 401


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_time_and_without_a_traceback(number: signal.Signals, saved: tuple[str, str]) -> None:
    """A request is half sent. One of the servers lets everybody ask, and the other makes up a token, which it shows."""
    given = ("--token", "none") if number == signal.SIGTERM else ()
    server = Served(saved[0], "--limits.stop-within", "1", *given)
    token = "" if given else server.line[4]
    assert len(server.line) == 3 if given else (server.line[3] == "token" and len(token) >= 32)
    host, port = "127.0.0.1", int(server.url.split(":")[2].split("/")[0])
    with socket.create_connection((host, port), timeout=60) as half:
        half.sendall(
            f"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 10\r\n\r\n{{".encode()
        )
        assert server.post({"query": ["a"]}, token)[0] == 200
        assert given or server.post({"query": ["a"]})[0] == 401
        started = time.monotonic()
        out, err = server.stop(number)
    assert time.monotonic() - started < 30, "of a loaded machine; the deadline is 6 s"
    assert server.process.returncode in (-number, 128 + number)
    assert "Traceback" not in out + err
    with pytest.raises(OSError):
        socket.create_connection((host, port), timeout=10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("MODEL --port PORT", "cannot listen on 127.0.0.1:PORT: Address already in use; choose another --port"),
        ("MODEL --port 99999", "--port 99999 is not a port: choose one from 0 to 65535"),
        ("MODEL --port -1", "--port -1 is not a port: choose one from 0 to 65535"),
        ("MODEL --port x", "--port"),
        (
            "MODEL --host 203.0.113.7",
            "cannot listen on 203.0.113.7:0: Cannot assign requested address; choose another --host",
        ),
        ("MODEL --host nowhere.invalid", "choose another --host"),
        ("MODEL --host LONG", "it is not a host name; choose another --host"),
        ("MODEL --batch 0", "--batch must be at least 1, not 0"),
        ("MODEL --max-body 0", "--max-body must be at least 1, not 0"),
        ("MODEL --wait -1", "--wait must be at least 0, not -1.0"),
        ("MODEL --wait nan", "--wait must be at least 0, not nan"),
        ("MODEL --limits.stop-within 0", "--limits.stop-within must be at least 1, not 0.0"),
        ("MODEL --token env:NOT_THERE", "NOT_THERE"),
        ("MODEL --prot 5000", "--port"),
        ("", "serve-reward needs MODEL"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(
    flags: str, message: str, saved: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [{"MODEL": saved[0], "LONG": "ä" * 100, "PORT": port}.get(word, word) for word in flags.split()]
        if words and "--port" not in words and "--prot" not in words:
            words += ["--port", "0"]
        assert main(["serve-reward", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message.replace("PORT", port) in lines[0], lines
