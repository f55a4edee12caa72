"""Requests to servers: none is lost or mixed up, failures go to another server, and a wrong answer never reaches training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from math import log
from pathlib import Path
from typing import Any

import pytest
from changed_role import FrozenRole
from served_model import TOKEN, WIDTH, ServedModel

from rlhf_core.contract.batch import Prompts
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import RunStopped, UsageError
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm import server_host
from rlhf_rollout_vllm.engine import VLLM
from rlhf_rollout_vllm.servers import servers_of_rank
from rlhf_rollout_vllm.session import Engine

SAMPLING = Sampling(n=3, max_new_tokens=5, temperature=0.7)

Opened = Callable[..., Engine]


@pytest.fixture
def opened(role: LocalRole, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """`opened(*servers, **options)`: an engine over servers that keep their weights; all are closed at the end."""
    made: list[Any] = []
    frozen: Any = FrozenRole(role)

    def make(*served: ServedModel, **options: Any) -> Engine:
        made.extend(served)
        urls = tuple(each.url for each in served)
        engine = Engine(VLLM(server=urls, transfer="none", **{"token": "env:SERVER_TOKEN", **options}), frozen)
        made.append(engine)
        engine.update(frozen)
        return engine

    monkeypatch.setenv("SERVER_TOKEN", TOKEN)
    monkeypatch.setattr(server_host, "LONGEST_WAIT", 0.0)
    yield make
    for each in reversed(made):
        each.close()


def test_every_completion_is_that_of_its_own_seed_whichever_server_answers(opened: Opened, prompts: Prompts) -> None:
    served = ServedModel(), ServedModel()
    rollouts = opened(*served).sample(prompts, SAMPLING)
    seeds = [SAMPLING.seed_for(uid, k) for uid in prompts.uids for k in range(3)]
    assert rollouts.tokens_NT.tolist() == [[(seed + i) % 200 for i in range(5)] for seed in seeds]
    assert (
        rollouts["sampler_logprobs_NT"].eq(-log(WIDTH)).all()
        or rollouts["sampler_logprobs_NT"].sub(-log(WIDTH)).abs().max() < 1e-6
    )  # float32
    asked = [request for each in served for request in each.asked]
    assert len({request["request_id"] for request in asked}) == len(asked) == 3 * len(prompts)
    by_seed = {request["sampling_params"]["seed"]: request["token_ids"] for request in asked}
    assert by_seed == {seed: prompts.token_ids[i // 3] for i, seed in enumerate(seeds)}


def test_a_server_has_no_more_requests_than_the_option_says(opened: Opened, prompts: Prompts) -> None:
    together = threading.Barrier(2, timeout=60)

    def wait(_: Mapping[str, Any], body: dict[str, Any]) -> Any:
        together.wait()
        return body

    served = ServedModel(wait)
    opened(served, in_flight=2).sample(prompts, Sampling(n=2, max_new_tokens=2))
    assert served.most_at_once == 2


def _drop(*_: Any) -> Any:
    raise ConnectionError


def _error(*_: Any) -> Any:
    return 503, {"error": "overloaded"}


def _change(**choice: Any) -> Any:
    def change(_: Mapping[str, Any], body: dict[str, Any]) -> Any:
        body["choices"][0] |= choice
        return body

    return change


def _other_request(_: Mapping[str, Any], body: dict[str, Any]) -> Any:
    return body | {"request_id": "generate-tokens-another"}


WRONG = {
    "closed": (_drop, "Remote end closed connection|Connection reset"),
    "overloaded": (_error, "503"),
    "no JSON object": (lambda *_: (200, [1]), "another form"),
    "no choice": (lambda *_: (200, {"choices": []}), "another form"),
    "another request": (_other_request, "another request was answered"),
    "a token that is none": (_change(token_ids=[1, 2, 3, 4, WIDTH]), "tokens that the model has not"),
    "no number": (_change(token_ids=[1, 2, 3, 4, True]), "tokens that the model has not"),
    "too many": (_change(token_ids=[1] * 6), "6 of at most 5 tokens"),
    "too few for its end": (_change(token_ids=[1] * 4), "4 of at most 5 tokens and ends by 'length'"),
    "aborted": (_change(finish_reason="abort"), "ends by 'abort'"),
    "numbers of other tokens": (_change(token_ids=[9] * 5), "log-probabilities of other tokens"),
    "no numbers": (_change(logprobs={"content": None}), "no log-probabilities"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_asked_again_elsewhere_and_alone_it_stops_the_run(
    name: str, opened: Opened, prompts: Prompts
) -> None:
    spoil, message = WRONG[name]
    right = opened(ServedModel()).sample(prompts, SAMPLING)
    bad, good = ServedModel(spoil), ServedModel()
    assert opened(bad, good).sample(prompts, SAMPLING).tokens_NT.tolist() == right.tokens_NT.tolist()
    assert bad.asked, "the wrong one was asked, too"
    with pytest.raises(RunStopped, match=f"failed 3 times, at last at {bad.url}: .*({message})"):
        opened(bad, retries=2).sample(prompts.rows([0]), Sampling(n=1, max_new_tokens=5))


@pytest.mark.parametrize("value", [-9999.0, 0.5])
def test_impossible_log_probabilities_are_refused(value: float, opened: Opened, prompts: Prompts) -> None:
    def spoil(_: Mapping[str, Any], body: dict[str, Any]) -> Any:
        body["choices"][0]["logprobs"]["content"][2]["logprob"] = value
        return body

    with pytest.raises(RunStopped, match="no sampled token can have"):
        opened(ServedModel(spoil), retries=0).sample(prompts.rows([0]), SAMPLING)


def test_a_request_that_a_server_refuses_is_not_sent_again(opened: Opened, prompts: Prompts) -> None:
    served = ServedModel(lambda *_: (400, {"error": "too many logprobs"}))
    with pytest.raises(UsageError, match="refused a request: 400 .*too many logprobs"):
        opened(served).sample(prompts.rows([0]), Sampling(n=1, max_new_tokens=2))
    assert len(served.asked) == 1


def test_a_server_that_does_not_answer_in_time_is_given_up(opened: Opened, prompts: Prompts) -> None:
    hang = threading.Event()

    def wait(_: Mapping[str, Any], body: dict[str, Any]) -> Any:
        hang.wait(60)
        return body

    try:
        engine = opened(ServedModel(wait), answer_seconds=5.0, retries=0)
        with pytest.raises(RunStopped, match="no complete answer within 5 s"):
            engine.sample(prompts.rows([0]), Sampling(n=1, max_new_tokens=2))
    finally:
        hang.set()


def test_opening_names_what_is_wrong_with_a_server(opened: Opened) -> None:
    with pytest.raises(UsageError, match=r"before truncation; start it with --logprobs-mode processed_logprobs$"):
        opened(ServedModel(raw=True))
    with pytest.raises(UsageError, match=r"refused: 401 .*; give token$"):
        opened(ServedModel(), token="another-token")
    closed = ServedModel()
    closed.close()
    with pytest.raises(UsageError, match=rf"no server answers at {closed.url}: .*; start it first$"):
        opened(closed)


def test_a_trained_role_needs_a_way_for_its_weights(role: LocalRole, monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedModel()
    engine = Engine(VLLM(server=(served.url,), transfer="none", token=TOKEN), role)
    with pytest.raises(UsageError, match=r"none is for roles whose weights never change, and those of 'actor' do"):
        engine.update(role)
    engine.close()
    served.close()


def test_a_trained_role_is_told_of_it_before_models_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"none is for roles that no term trains, and actor is trained; choose another way$"
    ):
        tiny_run(tmp_path / "run", rollout=VLLM(server=("http://127.0.0.1:1",), transfer="none")).train()
    assert not (tmp_path / "run").exists()


def test_ranks_share_servers_evenly() -> None:
    urls = ["a", "b", "c", "d"]
    assert servers_of_rank(urls, {}) == urls
    assert [servers_of_rank(urls, {"WORLD_SIZE": "2", "RANK": str(rank)}) for rank in (0, 1)] == [
        ["a", "c"],
        ["b", "d"],
    ]
    with pytest.raises(UsageError, match="has 4 addresses, which 3 ranks cannot share evenly"):
        servers_of_rank(urls, {"WORLD_SIZE": "3", "RANK": "0"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server": ("localhost:8000",)}, "server: localhost:8000 is not an address such as http://127.0.0.1:8000"),
        ({"server": ("http://elsewhere:1",)}, "shared_memory does not reach http://elsewhere:1, another machine"),
        ({"server": ("http://127.0.0.1:1",), "transfer": "ipc"}, "ipc does not go over HTTP"),
        ({"server": ("http://127.0.0.1:1",), "process": "own"}, "process is of engines that a run starts"),
        ({"server": ("http://127.0.0.1:1",), "max_num_seqs": 3}, "max_num_seqs is of engines that a run starts"),
        ({"transfer": "none"}, "transfer none is for servers, which have weights; pass server"),
        ({"server": ("http://127.0.0.1:1",), "in_flight": 0}, "in_flight must be at least 1, not 0"),
        ({"server": ("http://127.0.0.1:1",), "retries": -1}, "retries must be at least 0, not -1"),
    ],
)
def test_options_that_do_not_fit_are_a_users_mistake(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VLLM(**options)


def test_the_token_is_in_no_text_of_the_provider() -> None:
    import pickle

    provider = VLLM(server=("http://127.0.0.1:1",), token="env:SERVER_TOKEN")
    assert b"a-token" not in pickle.dumps(provider)
    assert provider.has_own_weights


def test_an_engine_brings_weights_to_all_servers() -> None:
    assert VLLM(server=("http://127.0.0.1:1",)).single_engine
    assert not VLLM(server=("http://127.0.0.1:1",), transfer="none").single_engine
    assert not VLLM(process="own").single_engine


def test_engines_apart_take_weights_midway_unless_adapters_come_alone() -> None:
    assert VLLM(server=("http://127.0.0.1:1",)).takes_weights_midway
    assert VLLM(process="own").takes_weights_midway
    assert not VLLM(process="own", lora="adapter").takes_weights_midway
    assert not VLLM(server=("http://127.0.0.1:1",), transfer="none").takes_weights_midway
    assert not VLLM().takes_weights_midway
