"""Texts of the endpoint: stop strings, turns that differ in blanks alone, and requests that are malformed."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from endpoint_agents import EOS, PLAIN, TOKENIZER, Echo, chat, encoder, post, run_agent

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.rollout.assemble import assemble

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


class Stopping(Echo):
    """Ends each answer as an engine does that found a stop string in the newest token: without the end token."""

    def __call__(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rows = [[*self.answers[len(self.read) + i].encode()] for i in range(len(prompts))]
        self.read.extend(prompts.token_ids)
        numbers = {"sampler_logprobs_NT": [[0.0] * len(row) for row in rows]}
        return assemble(prompts, rows, ["stop"] * len(rows), TOKENIZER, version=3, per_token=numbers)


def test_a_stop_string_that_the_agent_writes_again_is_read_once(tmp_path: Path) -> None:
    """As agents of ReAct do. One that leaves it out continues the same ids."""

    def agent(base_url: str, api_key: str) -> float:
        body = {"prompt": "Go ", "stop": "Result:"}
        _, first = post(base_url, api_key, "completions", body)
        assert first["choices"][0]["text"] == "add "
        _, second = post(base_url, api_key, "completions", {**body, "prompt": "Go add Result: 2\n"})
        assert second["choices"][0]["text"] == "end "
        post(base_url, api_key, "completions", {**body, "prompt": "Go add Result: 2\nend 4"})
        return 1.0

    policy = Stopping(["add Result:", "end Result:", "Result:"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    read = ["Go ", "Go add Result: 2\n", "Go add Result: 2\nend Result:4"]
    assert [bytes(each).decode() for each in policy.read] == read
    assert rollouts["segments_N"].tolist() == [1]


@pytest.mark.parametrize("written", ["So Result:", "So Result:\n2"])
def test_the_text_ends_before_the_stop_string_even_inside_a_token(written: str, tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        more = {"messages": [USER], "max_tokens": 50}
        _, answer = post(base_url, api_key, "messages", {**more, "stop_sequences": ["xyz", "Result:"]})
        assert answer["content"] == [{"type": "text", "text": "So "}]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "Result:")
        assert chat(base_url, api_key, [USER], stop=["Result:"])["content"] == "So "
        return 1.0

    run_agent(Stopping([written, written]), agent, encoder(PLAIN, tmp_path))


def test_turns_that_differ_in_blanks_alone_stay_as_they_were_sampled(tmp_path: Path) -> None:
    calls = [
        '<tool_call>{"name": "add", "arguments": {}}</tool_call>',
        '<tool_call>{"name":"add","arguments":{}}</tool_call>',
    ]

    def agent(base_url: str, api_key: str) -> float:
        messages: list[Any] = [USER]
        for _ in range(3):
            messages += [chat(base_url, api_key, messages, tools=[TOOL]), {"role": "tool", "content": "2"}]
        return 1.0

    policy = Echo([*calls, "ab"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    first, second = ([*call.encode(), EOS, *b"[t]2[a]"] for call in calls)
    assert policy.read[2] == [*b"T1;[u]Hi[a]", *first, *second]
    assert rollouts["segments_N"].tolist() == [1]


MALFORMED: list[tuple[str, Any, str]] = [
    ("chat/completions", {"messages": [USER], "stop": 5}, "stop must be a string, or a list of strings"),
    ("chat/completions", {"messages": [USER], "stop": {"a": 1}}, "stop must be a string, or a list of strings"),
    ("completions", {"prompt": "a\ud800"}, "half of a surrogate pair"),
    ("completions", {"prompt": [10, 99_999]}, "prompt has the id 99999, but the policy's tokens have ids below "),
    ("messages", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("route", "body", "message"), MALFORMED)
def test_a_malformed_request_is_the_clients_mistake(route: str, body: Any, message: str, tmp_path: Path) -> None:
    """Clients repeat a request after 500, and not after 400."""

    def agent(base_url: str, api_key: str) -> float:
        status, answer = post(base_url, api_key, route, body)
        assert (status, message in answer["error"]["message"]) == (400, True), answer
        chat(base_url, api_key, [USER])
        return 1.0

    run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path))


def test_requests_as_other_programs_send_them(tmp_path: Path) -> None:
    """Tokens of two clients, other methods on one connection, and a head that is no number."""

    def agent(base_url: str, api_key: str) -> float:
        url = urlsplit(base_url)
        known = {"Authorization": f"bearer {api_key}"}
        body = json.dumps({"messages": [USER]})

        def status(method: str, path: str, headers: dict[str, str], content: str | None = None) -> int:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            response.read()
            return response.status

        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
        assert status("POST", f"{url.path}/chat/completions", known, body) == 200
        both = {"Authorization": "Bearer another", "X-Api-Key": api_key}
        assert status("POST", f"{url.path}/messages", both, body) == 200
        assert status("GET", f"{url.path}/models/org/name", known) == 200
        assert status("GET", f"{url.path}/modes", known) == 404
        assert status("GET", f"{url.path}/messages", known) == 405
        connection.close()
        with socket.create_connection((url.hostname or "", url.port or 0), timeout=60) as plain:
            plain.sendall(b"HEAD / HTTP/1.1\r\n\r\nHEAD / HTTP/1.1\r\nConnection: close\r\n\r\n")
            answers = b"".join(iter(lambda: plain.recv(1 << 16), b""))
        assert [each.split(b"\r\n")[0] for each in answers.split(b"\r\n\r\n")] == [b"HTTP/1.1 410 Gone"] * 2 + [b""]
        with socket.create_connection((url.hostname or "", url.port or 0), timeout=60) as plain:
            plain.sendall(b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n")
            assert plain.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
        return 1.0

    run_agent(Echo(["ab"] * 2), agent, encoder(PLAIN, tmp_path))


def test_a_body_in_chunks_is_read_as_one_with_a_length(tmp_path: Path) -> None:
    """RFC 9112, section 7.1: sizes in hexadecimal, extensions after them, fields after the body; then the next request."""
    whole = json.dumps({"messages": [USER]}).encode()
    policy = Echo(["ab", "cd"])

    def agent(base_url: str, api_key: str) -> float:
        url = urlsplit(base_url)
        head = f"POST {url.path}/chat/completions HTTP/1.1\r\nAuthorization: Bearer {api_key}\r\n"
        chunked = f"{head}Transfer-Encoding: Chunked\r\n\r\n".encode()

        def sent(content: bytes) -> bytes:
            with socket.create_connection((url.hostname or "", url.port or 0), timeout=60) as plain:
                plain.sendall(content)
                return b"".join(iter(lambda: plain.recv(1 << 16), b""))

        body = b"A;x=1\r\n" + whole[:10] + b"\r\n%x\r\n" % len(whole[10:]) + whole[10:] + b"\r\n0\r\nX: y\r\n\r\n"
        again = f"{head}Connection: close\r\nContent-Length: {len(whole)}\r\n\r\n".encode() + whole
        answers = sent(chunked + body + again)
        assert answers.count(b"HTTP/1.1 200 OK") == 2 and b'"ab"' in answers and b'"cd"' in answers
        for wrong in (b"zz\r\n", b"-1\r\n", b"0x1\r\n", b"\r\n", b"1\r\nabc\r\n"):
            assert sent(chunked + wrong).startswith(b"HTTP/1.1 400 "), wrong
        assert sent(chunked + b"ffffffff\r\n").startswith(b"HTTP/1.1 413 ")
        assert sent(f"{head}Transfer-Encoding: gzip\r\n\r\n".encode()).startswith(b"HTTP/1.1 501 ")
        return 1.0

    run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read == [[*b"[u]Hi[a]"]] * 2


def test_tokens_are_counted_as_they_would_be_read_and_nothing_is_sampled(tmp_path: Path) -> None:
    policy = Echo(["ab", "c"])

    def agent(base_url: str, api_key: str) -> float:
        chats = [{"messages": [USER]}, {"system": "S", "messages": [USER]}]
        assert [post(base_url, api_key, "messages/count_tokens", each)[1] for each in chats] == [
            {"input_tokens": len("[u]Hi[a]")},
            {"input_tokens": len("[s]S[u]Hi[a]")},
        ]
        answer = chat(base_url, api_key, [USER])
        chat_after = {"messages": [USER, answer, USER]}
        status, counted = post(base_url, api_key, "messages/count_tokens", chat_after)
        status, message = post(base_url, api_key, "messages", {**chat_after, "max_tokens": 9})
        assert status == 200 and message["usage"]["input_tokens"] == counted["input_tokens"] == len(policy.read[1])
        status, refused = post(base_url, api_key, "messages/count_tokens", {"messages": []})
        assert (status, refused["type"]) == (400, "error")
        return 1.0

    run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert len(policy.read) == 2
