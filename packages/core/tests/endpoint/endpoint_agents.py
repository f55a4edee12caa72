"""Shared parts of the endpoint tests: a tiny chat template, a scripted policy, and HTTP calls."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.options import EpisodeLimits, ModelOptions, Sampling
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.endpoint.harness import Harness, HarnessEngine
from rlhf_core.models.loading.tokenizer import load_tokenizer
from rlhf_core.rollout.assemble import assemble
from rlhf_core.rollout.driving import drive

TOKENIZER = load_tokenizer("tiny", ModelOptions())
EOS = int(TOKENIZER.eos_token_id)

PLAIN = (
    "{% if tools %}T{{ tools|length }};{% endif %}"
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% if m.role == 'assistant' %}"
    + TOKENIZER.eos_token
    + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
"""One letter for each role; an assistant's turn ends with the end token."""
FORGETFUL = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and not loop.last and '#' in m.content %}{{ m.content.split('#')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}",
)
"""Removes what stands before a # from earlier turns, as some templates remove reasoning."""


def encoder(template: str, folder: Path) -> Encoder:
    path = folder / "template.jinja"
    path.write_text(template)
    return Encoder(TOKENIZER, encoding=Encoding(template_file=str(path)))


def rows(*texts: str) -> Prompts:
    examples = [Example(({"role": "user", "content": text},), origin=f"rows.jsonl:{i}") for i, text in enumerate(texts)]
    return Prompts(list(texts), [list(text.encode()) for text in texts], examples, [10 + i for i in range(len(texts))])


@dataclass
class Echo:
    """A policy: `answers[i]` is what it writes at the i-th call, and it ends with the end token."""

    answers: Sequence[str]
    read: list[list[int]] = field(default_factory=list)

    def __call__(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        tokens = []
        for ids, limit in zip(prompts.token_ids, prompts.limits, strict=True):
            answer = self.answers[len(self.read)]
            self.read.append(ids)
            tokens.append([*answer.encode(), EOS][:limit])
        return assembled(prompts, tokens)


def assembled(prompts: Prompts, tokens: list[list[int]]) -> Rollouts:
    finish: Any = ["stop" if row[-1] == EOS else "length" for row in tokens]
    logprobs = [[-number / 100 for number in row] for row in tokens]
    return assemble(prompts, tokens, finish, TOKENIZER, version=3, per_token={"sampler_logprobs_NT": logprobs})


def run_agent(
    sample: Any,
    agent: Callable[..., Any],
    encode: Encoder,
    *texts: str,
    limits: EpisodeLimits | None = None,
    tokens: int = 4000,
    **options: Any,
) -> Rollouts:
    """Let an agent drive an episode for each text."""
    engine = HarnessEngine(Harness(agent=agent, **options))
    sampling = Sampling(n=1, max_new_tokens=tokens, seed=5)
    return drive(sample, engine, rows(*(texts or ("Hi",))), sampling, limits or EpisodeLimits(turns=100), encode)


def post(base_url: str, api_key: str, route: str, body: Any, timeout: float = 120.0) -> tuple[int, Any]:
    """Send a request; return the status and what was answered: JSON, or the events of a stream."""
    parts = urlsplit(base_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    content = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", f"{parts.path}/{route}", content, {"Authorization": f"Bearer {api_key}"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.getheader("Content-Type", "").startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        return response.status, [line if line == "[DONE]" else json.loads(line) for line in lines]
    return response.status, json.loads(text)


def chat(base_url: str, api_key: str, messages: Any, **more: Any) -> dict[str, Any]:
    """Return the assistant's message."""
    status, answer = post(base_url, api_key, "chat/completions", {"model": "any", "messages": messages, **more})
    assert status == 200, answer
    message: dict[str, Any] = answer["choices"][0]["message"]
    return message


def leave_early(base_url: str, api_key: str, content: str, sampling: threading.Event | None = None) -> None:
    """Ask for a turn and go away before it comes; with `sampling`, after that is set, and until the endpoint has noticed."""
    parts = urlsplit(base_url)
    body = b'{"messages": [{"role": "user", "content": "%s"}]}' % content.encode()
    head = (
        f"POST {parts.path}/chat/completions HTTP/1.1\r\nAuthorization: Bearer {api_key}\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if sampling is not None:
            assert sampling.wait(60)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"", "the turn was answered"
