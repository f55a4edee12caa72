"""Rewards over HTTP: no wrong, lost or doubled reward under load while replicas die, and one line when all are gone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.errors import UsageError
from rlhf_core.reward.http import Replicas
from rlhf_core.reward.output import to_reward_output
from rlhf_core.reward.remote import Remote

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def rollouts(*texts: str) -> Rollouts:
    N = len(texts)
    ones = torch.ones(N, 1, dtype=torch.long)
    return Rollouts(
        prompts=["<user>p"] * N,
        texts=list(texts),
        prompt_NL=ones,
        prompt_lengths_N=ones[:, 0],
        tokens_NT=ones,
        lengths_N=ones[:, 0],
        mask_NT=ones.bool(),
        group_N=torch.arange(N),
        labels=["l"] * N,
        meta=[{"prompt": "p"}] * N,
        finish=["stop"] * N,
    )


class Server:
    """A server of the standard library, with what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(self.headers)
                code, reply = answer(body)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/get_reward"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serving() -> Iterator[Callable[[Answer], Server]]:
    servers: list[Server] = []
    yield lambda answer: servers.append(Server(answer)) or servers[-1]  # type: ignore[func-returns-value]
    for server in servers:
        server.close()


def lengths(body: dict[str, Any]) -> tuple[int, Any]:
    """An OpenRLHF server that rewards long queries."""
    return 200, {
        "rewards": [len(query) for query in body["query"]],
        "scores": [1] * len(body["query"]),
        "extra_logs": {},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_question_has_openrlhfs_form_and_answers_come_back_in_order(serving: Any) -> None:
    server = serving(lengths)
    reward = Remote((server.url,), batch=2, token="secret")
    batch = rollouts("a", "bb", "ccc", "dddd", "eeeee")
    output = to_reward_output(reward(batch), batch, reward)
    assert output.rewards_N.tolist() == [8, 9, 10, 11, 12]
    assert output.scores_N is not None
    assert sorted(len(asked["query"]) for asked in server.asked) == [1, 2, 2]
    asked = next(each for each in server.asked if each["ids"] == [0, 1])
    assert asked == {
        "query": ["<user>pa", "<user>pbb"],
        "prompts": ["<user>p", "<user>p"],
        "labels": ["l", "l"],
        "raw_prompts": ["p", "p"],
        "completions": ["a", "bb"],
        "ids": [0, 1],
    }
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_replicas_share_the_questions(serving: Any) -> None:
    one, two = serving(lengths), serving(lengths)
    Remote((one.url, two.url), batch=1)(rollouts(*"abcdefgh"))
    assert (len(one.asked), len(two.asked)) == (4, 4)


def test_a_dead_replica_costs_one_failed_connection(serving: Any) -> None:
    server = serving(lengths)
    dead = f"http://127.0.0.1:{free_port()}/"
    started = time.monotonic()
    rewards = Remote((dead, server.url), batch=1, parallel=1)(rollouts(*"abcd")).rewards_N
    assert rewards.tolist() == [8, 8, 8, 8]
    assert time.monotonic() - started < 1  # no backoff while another answers


def test_an_overloaded_server_is_tried_again(serving: Any) -> None:
    answers = iter([(503, {"error": "busy"}), (200, b"no json"), (200, {"rewards": [1.0]})])
    server = serving(lambda _: next(answers))
    assert Remote((server.url,), backoff=0.01)(rollouts("a")).rewards_N.tolist() == [1]


def test_when_all_are_gone_each_says_why_in_one_line(serving: Any) -> None:
    server = serving(lambda _: (500, {"error": "out of memory"}))
    dead = f"http://127.0.0.1:{free_port()}/"
    with pytest.raises(UsageError) as caught:
        Remote((dead, server.url), tries=2, backoff=0.01)(rollouts("a"))
    message = str(caught.value)
    assert message.startswith("url: no server answered in 2 tries: ")
    assert f"{dead}: " in message
    assert "refused" in message
    assert f'{server.url}: 500 Internal Server Error: {{"error": "out of memory"}}' in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {"error": "send the token"}), 'refused: 401 Unauthorized: {"error": "send the token"}'),
        ((302, {}), "refused: 302 Found"),
        ((200, {"rewards": [1, 2]}), "a server returned 2 rewards for 1 samples"),
        ((200, {"rewards": [1], "ids": [7]}), r"answered for samples \[7\], but the request was for \[0\]"),
        ((200, {"score": [1]}), "returned a dict without 'rewards': score"),
        ((200, {"rewards": ["x"]}), "could not convert string to float"),
    ],
)
def test_an_answer_that_is_wrong_stops_at_once(serving: Any, answer: Any, message: str) -> None:
    server = serving(lambda _: answer)
    with pytest.raises(UsageError, match=message):
        Remote((server.url,))(rollouts("a"))
    assert len(server.asked) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:5000", "ftp://x/", "file:///etc/passwd", "http://"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected an address such as http://"):
        Remote((url,))(rollouts("a"))


# ----------------------------------------------------------------------------------------------------------------------
# serve-reward
# ----------------------------------------------------------------------------------------------------------------------

SCORER = """
import sys, time
from rlhf_core.reward.serve import make_app
from rlhf_core.reward.serve_http import bind_address, serve
def score(samples):
    time.sleep(0.002)
    if any("poison" in sample.query for sample in samples):
        raise ValueError("poisoned")
    return [float(sample.completion or len(sample.query)) for sample in samples]
serve(make_app(score, "secret", max_body=10_000), bind_address("127.0.0.1", 0))
"""


def started() -> tuple[subprocess.Popen[str], str]:
    """A server process that scores a completion with the number it is, and its address."""
    process = subprocess.Popen([sys.executable, "-c", SCORER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[2]


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[tuple[subprocess.Popen[str], str]]]:
    pytest.importorskip("fastapi")
    with ThreadPoolExecutor(2) as threads:
        running = list(threads.map(lambda _: started(), range(3)))
    yield running
    for process, _ in running:
        process.kill()
        process.communicate()


def post(url: str, body: bytes, token: str = "secret") -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_server_answers_openrlhfs_clients_and_refuses_the_rest(replicas: Any) -> None:
    url = replicas[0][1]
    code, answer = post(url, b'{"query": ["abc", "defgh"], "prompts": ["a", "d"], "labels": [null, null]}')
    assert (code, answer["rewards"], answer["scores"], answer["extra_logs"]) == (200, [3, 5], [3, 5], {})
    assert "ids" not in answer
    assert post(url, b'{"query": "abc"}')[1]["rewards"] == [3]
    assert post(url, b'{"query": ["abc"]}', token="guess")[0] == 401
    assert post(url, b'{"query": ["%s"]}' % (b"x" * 20_000))[0] == 413
    for body in (
        b"not json",
        b"[]",
        b'{"query": [1]}',
        b'{"query": []}',
        b'{"query": ["a"], "completions": ["1", "2"]}',
    ):
        assert post(url, body)[0] == 422
    assert post(url, b'{"query": ["poison"]}') == (422, {"error": "ValueError: poisoned"})
    assert post(url, b'{"query": ["still alive"]}')[0] == 200


def test_health_needs_no_token_and_metrics_count(replicas: Any) -> None:
    base = replicas[0][1].removesuffix("/get_reward")
    with urllib.request.urlopen(f"{base}/health", timeout=120) as response:
        assert json.load(response) == {"status": "ok"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{base}/metrics", timeout=120)


def test_64_clients_get_each_reward_once_while_replicas_are_killed_until_all_are(replicas: Any) -> None:
    """Each client checks its own rewards, and the ids of all are counted; when nobody is left, each is told so in a line."""
    reward = Remote(tuple(url for _, url in replicas), token="secret", batch=1, parallel=1, backoff=0.05, tries=2)
    done: Counter[str] = Counter()
    doomed = {100: replicas[1][0], 250: replicas[2][0]}  # by how many rewards were given

    def client(number: int) -> bool:
        texts = [str(number * 1000 + i) for i in range(8)]
        rewards = reward(rollouts(*texts)).rewards_N.tolist()
        done.update(f"{value:.0f}" for value in rewards)
        for given, process in doomed.items():
            if sum(done.values()) > given and process.poll() is None:
                process.kill()
        return rewards == [float(text) for text in texts]

    with ThreadPoolExecutor(64) as threads:
        assert all(threads.map(client, range(64)))
    assert all(process.wait(timeout=120) != 0 for process in doomed.values())
    assert done == Counter(str(number * 1000 + i) for number in range(64) for i in range(8))
    with urllib.request.urlopen(
        urllib.request.Request(
            replicas[0][1].replace("get_reward", "metrics"), headers={"Authorization": "Bearer secret"}
        )
    ) as response:
        counts = dict(line.split() for line in response.read().decode().splitlines())
    assert float(counts["rlhf_reward_batches_total"]) < float(counts["rlhf_reward_requests_total"])  # scored together

    replicas[0][0].kill()
    replicas[0][0].wait(timeout=120)

    def told(number: int) -> str:
        with pytest.raises(UsageError) as caught:
            reward(rollouts(str(number)))
        return str(caught.value)

    with ThreadPoolExecutor(64) as threads:
        for line in threads.map(told, range(64)):
            assert line.startswith("url: no server answered in 2 tries: ")
            assert all(f"{url}: " in line for _, url in replicas)
            assert "\n" not in line


def test_replicas_need_an_address() -> None:
    with pytest.raises(UsageError, match="needs at least one address"):
        Replicas([])
