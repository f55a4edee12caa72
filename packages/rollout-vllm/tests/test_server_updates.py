"""Weights of a run at servers: every server takes part, and those that do not are noticed by what they answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from served_model import TOKEN, ServedModel

from rlhf_core.errors import ContractError, RunStopped, UsageError
from rlhf_rollout_vllm.server_answers import StaleWeights, label, read_completion
from rlhf_rollout_vllm.server_client import ServerClient
from rlhf_rollout_vllm.servers import Server

UPDATE = ("/start_weight_update", "/update_weights", "/finish_weight_update")
REQUEST = {"request_id": "r", "sampling_params": {"max_tokens": 3}}


@pytest.fixture
def pair() -> Iterator[tuple[ServedModel, ServedModel]]:
    served = ServedModel(), ServedModel()
    for each in served:
        each.routes = dict.fromkeys((*UPDATE, "/init_weight_transfer_engine"), (200, {}))
        each.routes["/get_world_size"] = (200, {"world_size": 2})
    yield served
    for each in served:
        each.close()


@pytest.fixture
def client(pair: tuple[ServedModel, ServedModel]) -> ServerClient:
    made = ServerClient("rlhf_nccl", lambda: label("run", 7))
    made.targets = [Server(each.url, TOKEN, 60.0) for each in pair]
    for server in made.targets:
        server.is_stale = True
    return made


def _update(client: ServerClient) -> None:
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()


def test_every_server_is_called_the_same_number_of_times(
    pair: tuple[ServedModel, ServedModel], client: ServerClient
) -> None:
    _update(client)
    expected = list(zip(UPDATE, ({}, {"update_info": {"names": ["a"]}}, {"weight_version": "run-7"}), strict=True))
    assert [each.called for each in pair] == [expected, expected]
    assert client.calls == 3
    assert not any(server.is_stale for server in client.targets)


def test_the_ranks_of_a_server_follow_those_of_the_servers_before_it(
    pair: tuple[ServedModel, ServedModel], client: ServerClient
) -> None:
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    offsets = [each.called[-1][1]["init_info"]["rank_offset"] for each in pair]
    assert offsets == [1, 3]


@pytest.mark.parametrize("path", UPDATE)
def test_a_server_that_fails_is_left_out_and_stale(
    path: str, pair: tuple[ServedModel, ServedModel], client: ServerClient
) -> None:
    bad, good = client.targets
    pair[0].routes[path] = (500, {"error": "worker failed"})
    _update(client)
    assert client.targets == [good]
    assert (bad.is_stale, good.is_stale, bad.failed_lately, good.failed_lately) == (True, False, True, False)
    assert [call for call, _ in pair[1].called] == list(UPDATE)


def test_without_a_server_that_takes_weights_the_run_stops(
    pair: tuple[ServedModel, ServedModel], client: ServerClient
) -> None:
    for each in pair:
        each.routes["/update_weights"] = (500, {"error": "worker failed"})
    with pytest.raises(RunStopped, match=r"accepts weights any more .* failed at /update_weights: 500 .*worker failed"):
        _update(client)


@pytest.mark.parametrize("after", ["', please check the stack trace", "\n  File", ""])
def test_a_tensor_that_was_left_out_is_named(
    after: str, pair: tuple[ServedModel, ServedModel], client: ServerClient
) -> None:
    """Whatever vLLM puts around the words."""
    told = f"Worker failed with error 'the role's weights() omitted 1 of the model's tensors; vLLM's 'a.b' is the first{after}"
    pair[1].routes["/update_weights"] = (500, {"error": {"message": told, "type": "InternalServerError", "code": 500}})
    with pytest.raises(
        ContractError, match=r"^the role's weights\(\) omitted 1 of the model's tensors; vLLM's 'a.b' is the first$"
    ):
        _update(client)


def test_a_server_without_the_routes_is_a_users_mistake(
    pair: tuple[ServedModel, ServedModel], client: ServerClient
) -> None:
    del pair[0].routes["/init_weight_transfer_engine"]
    with pytest.raises(UsageError) as caught:
        client.init_weight_transfer_engine({"path": "x"})
    assert str(caught.value) == (
        f'server: {pair[0].url} takes no weights (404 Not Found: {{"detail": "Not Found"}}): start it with '
        'VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "rlhf_nccl"}\', or pass transfer = "none" for a '
        "role that is not trained"
    )


def _answer(spans: Any) -> dict[str, Any]:
    content = [{"token_id": token, "logprob": -1.0, "top_logprobs": []} for token in (5, 6, 7)]
    choice = {
        "token_ids": [5, 6, 7],
        "finish_reason": "length",
        "logprobs": {"content": content},
        "weight_versions": spans,
    }
    return {"request_id": "generate-tokens-r", "choices": [choice]}


def _span(version: str, start: int, end: int) -> dict[str, Any]:
    return {"version": version, "start": start, "end": end}


def test_versions_are_those_of_the_role() -> None:
    found = read_completion(_answer([_span("run-7", 0, 1), _span("run-8", 1, 3)]), REQUEST, 10, "run", 7)
    assert [(each.version, each.start, each.end) for each in found.weight_versions] == [("7", 0, 1), ("8", 1, 3)]


@pytest.mark.parametrize(
    "spans",
    [
        [_span("default", 0, 3)],
        [_span("other-7", 0, 3)],
        [_span("run-6", 0, 3)],
        [_span("default", 0, 1), _span("run-7", 1, 3)],
    ],
    ids=["started again", "of another run", "an update missed", "given weights meanwhile"],
)
def test_weights_that_are_not_the_runs_are_noticed(spans: Any) -> None:
    with pytest.raises(StaleWeights, match=r"weights '.*' sampled, and not 'run-7'"):
        read_completion(_answer(spans), REQUEST, 10, "run", 7)
    assert read_completion(_answer(spans), REQUEST, 10, "run", None).weight_versions == []


@pytest.mark.parametrize("spans", [None, [], [{"version": "run-7"}], [_span("run-7", 0, 2)], [_span("run-7", 1, 3)]])
def test_versions_cover_the_tokens(spans: Any) -> None:
    with pytest.raises(ValueError, match="versions of"):
        read_completion(_answer(spans), REQUEST, 10, "run", 7)
