"""The endpoint against transcripts written by hand, episodes that core drives, and clients of OpenAI and Anthropic."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_agents import EOS, FORGETFUL, PLAIN, Echo, chat, encoder, leave_early, post, run_agent

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import EpisodeLimits
from rlhf_core.endpoint.tool_calls import find_tool_calls

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_conversation_is_the_transcript_written_by_hand(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str, example: Example) -> dict[str, Any]:
        messages = [*example.prompt]
        answer = chat(base_url, api_key, messages)
        assert answer["content"] == "ab"
        messages += [answer, {"role": "user", "content": "more"}]
        assert chat(base_url, api_key, messages)["content"] == "c"
        return {"reward": 1.0, "turn_rewards": [0.25], "score": 0.5, "metrics": {"steps": 2}}

    policy = Echo(["ab", "c"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path), log=("steps",))
    assert policy.read == [[*b"[u]Hi[a]"], [*b"[u]Hi[a]ab", EOS, *b"[u]more[a]"]]
    assert rollouts.prompt_NL.tolist() == [[*b"[u]Hi[a]"]]
    assert rollouts.tokens_NT.tolist() == [[*b"ab", EOS, *b"[u]more[a]", *b"c", EOS]]
    assert rollouts.mask_NT.tolist() == [[True] * 3 + [False] * 10 + [True] * 2]
    expected = [[-0.97, -0.98, -EOS / 100, *[0.0] * 10, -0.99, -EOS / 100]]
    torch.testing.assert_close(rollouts["sampler_logprobs_NT"], torch.tensor(expected))
    assert rollouts["versions_NT"].tolist() == [[3] * 3 + [0] * 10 + [3] * 2]
    assert rollouts["environment_rewards_NT"].tolist() == [[0, 0, 0.25, *[0] * 11, 1.0]]
    assert rollouts["segments_N"].tolist() == [1]
    assert rollouts["environment/steps_N"].tolist() == [2.0]


def test_sampled_ids_are_never_encoded_again(tmp_path: Path) -> None:
    """The policy writes half a character: its text is another one, and the ids of the second request still begin with it."""

    class Halves(Echo):
        def __call__(self, prompts: Any, sampling: Any) -> Any:
            from endpoint_agents import assembled

            self.read.extend(prompts.token_ids)
            return assembled(prompts, [[0xC3, 0x28, EOS]])

    def agent(base_url: str, api_key: str) -> float:
        answer = chat(base_url, api_key, [USER])
        chat(base_url, api_key, [USER, answer, USER])
        return 1.0

    policy = Halves([])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read[1] == [*b"[u]Hi[a]", 0xC3, 0x28, EOS, *b"[u]Hi[a]"]
    assert rollouts["segments_N"].tolist() == [1]


def test_a_template_that_rewrites_earlier_turns_begins_a_segment(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        messages = [USER]
        for _ in range(3):
            messages += [chat(base_url, api_key, messages), USER]
        return 1.0

    policy = Echo(["why#ab", "c", "d"])
    rollouts = run_agent(policy, agent, encoder(FORGETFUL, tmp_path))
    second = [*b"[u]Hi[a]ab", EOS, *b"[u]Hi[a]"]
    assert policy.read == [[*b"[u]Hi[a]"], second, [*second, ord("c"), EOS, *b"[u]Hi[a]"]]
    assert rollouts["segments_N"].tolist() == [2]
    assert rollouts.tokens_NT.tolist() == [[*b"why#ab", EOS, *second, *b"c", EOS, *b"[u]Hi[a]", *b"d", EOS]]


def test_a_compaction_by_the_agent_begins_a_segment(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        answer = chat(base_url, api_key, [USER])
        chat(base_url, api_key, [{"role": "system", "content": "So far: " + answer["content"]}, USER])
        return 1.0

    rollouts = run_agent(Echo(["ab", "c"]), agent, encoder(PLAIN, tmp_path))
    assert rollouts["segments_N"].tolist() == [2]
    assert bytes(rollouts.tokens_NT[0, 3:-2].tolist()) == b"[s]So far: ab[u]Hi[a]"


def test_calls_of_tools_are_found_and_continue_the_context(tmp_path: Path) -> None:
    """The sampled JSON has blanks that no template would write; what the policy wrote stands in the context as it is."""
    call = 'Let me see.<tool_call>{"name":  "add", "arguments": {"a": 1}}</tool_call>'

    def agent(base_url: str, api_key: str) -> float:
        answer = chat(base_url, api_key, [USER], tools=[TOOL])
        assert answer["content"] == "Let me see."
        (found,) = answer["tool_calls"]
        assert (found["function"]["name"], json.loads(found["function"]["arguments"])) == ("add", {"a": 1})
        result = {"role": "tool", "tool_call_id": found["id"], "content": "2"}
        chat(base_url, api_key, [USER, answer, result], tools=[TOOL])
        return 1.0

    policy = Echo([call, "It is 2"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read[1] == [*b"T1;[u]Hi[a]", *call.encode(), EOS, *b"[t]2[a]"]
    assert rollouts["segments_N"].tolist() == [1]


def test_a_call_that_is_no_json_stays_text() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call> and <tool_call>{nothing}</tool_call>'
    rest, calls = find_tool_calls(text)
    assert rest == "and <tool_call>{nothing}</tool_call>"
    assert [call.name for call in calls] == ["f"]


def test_plain_texts_continue_too(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        _, first = post(base_url, api_key, "completions", {"prompt": "Go", "stop": "!"})
        (choice,) = first["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
        _, second = post(base_url, api_key, "completions", {"prompt": "Go" + choice["text"] + " on", "max_tokens": 2})
        assert second["choices"][0]["finish_reason"] == "length"
        return 1.0

    policy = Echo(["ab", "cdef"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read == [[*b"Go"], [*b"Goab", EOS, *b" on"]]
    assert rollouts.tokens_NT.tolist() == [[*b"ab", EOS, *b" on", *b"cd"]]


def test_ids_go_in_and_come_out_as_vllm_does(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        body = {"token_ids": [*b"Go"], "sampling_params": {"max_tokens": 9, "logprobs": 1}, "request_id": "mine"}
        status, answer = post(base_url.removesuffix("/v1"), api_key, "inference/v1/generate", body)
        assert (status, answer["request_id"]) == (200, "mine")
        (choice,) = answer["choices"]
        assert choice["token_ids"] == [*b"ab", EOS]
        assert [each["token_id"] for each in choice["logprobs"]["content"]] == choice["token_ids"]
        assert choice["logprobs"]["content"][0]["logprob"] == pytest.approx(-0.97)
        return 1.0

    assert run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path)).tokens_NT.tolist() == [[*b"ab", EOS]]


@pytest.mark.engines
def test_vllms_own_models_read_the_answer(tmp_path: Path) -> None:
    protocol = pytest.importorskip("vllm.entrypoints.scale_out.token_in_token_out.protocol")

    def agent(base_url: str, api_key: str) -> float:
        body = {"token_ids": [*b"Go"], "sampling_params": {"logprobs": 1}}
        _, answer = post(base_url.removesuffix("/v1"), api_key, "inference/v1/generate", body)
        assert protocol.GenerateTokensResponse.model_validate(answer).choices[0].token_ids == [*b"ab", EOS]
        return 1.0

    run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path))


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_needs_no_change(stream: bool, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    def agent(base_url: str, api_key: str) -> float:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        assert client.models.list().data[0].id == "policy"
        if stream:
            events = list(
                client.chat.completions.create(
                    model="x", messages=[USER], tools=[TOOL], stream=True, stream_options={"include_usage": True}
                )
            )
            delta = next(
                each.choices[0].delta.tool_calls for each in events if each.choices and each.choices[0].delta.tool_calls
            )
            assert (delta[0].function.name, delta[0].function.arguments) == ("add", '{"a": 1}')
            assert events[-1].usage.total_tokens == len(b"T1;[u]Hi[a]") + len(call) + 1
            message = {"role": "assistant", "content": None, "tool_calls": [each.model_dump() for each in delta]}
        else:
            answer = client.chat.completions.create(model="x", messages=[USER], tools=[TOOL], logprobs=True)
            assert answer.choices[0].finish_reason == "tool_calls"
            assert len(answer.choices[0].logprobs.content) == len(call) + 1
            message = answer.choices[0].message
        result = {"role": "tool", "tool_call_id": "x", "content": "2"}
        again = client.chat.completions.create(model="x", messages=[USER, message, result], tools=[TOOL])
        assert again.choices[0].message.content == "Two"
        with pytest.raises(openai.BadRequestError, match="n must be 1"):
            client.chat.completions.create(model="x", messages=[USER], n=2)
        return 1.0

    rollouts = run_agent(Echo([call, "Two"]), agent, encoder(PLAIN, tmp_path))
    assert rollouts["segments_N"].tolist() == [1]
    assert rollouts["turns_N"].tolist() == [2]


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_needs_no_change(stream: bool, tmp_path: Path) -> None:
    anthropic = pytest.importorskip("anthropic")
    call = 'So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    def agent(base_url: str, api_key: str) -> float:
        client = anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key, max_retries=0)
        tools = [{"name": "add", "description": "Adds.", "input_schema": {"type": "object"}}]
        known: dict[str, Any] = {"model": "x", "max_tokens": 100, "system": "Be brief.", "tools": tools}
        if stream:
            with client.messages.stream(messages=[USER], **known) as events:
                answer = events.get_final_message()
        else:
            answer = client.messages.create(messages=[USER], **known)
        text, use = answer.content
        assert (text.text, use.name, use.input, answer.stop_reason) == ("So:", "add", {"a": 1}, "tool_use")
        turn = {"role": "assistant", "content": [each.model_dump() for each in answer.content]}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "2"}
        again = client.messages.create(messages=[USER, turn, {"role": "user", "content": [result]}], **known)
        assert (again.content[0].text, again.stop_reason) == ("Two", "end_turn")
        with pytest.raises(anthropic.BadRequestError, match="messages and tools must be lists"):
            client.messages.create(messages="Hi", **known)
        return 1.0

    policy = Echo([call, "Two"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read[1] == [*b"T1;[s]Be brief.[u]Hi[a]", *call.encode(), EOS, *b"[t]2[a]"]
    assert rollouts["segments_N"].tolist() == [1]


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("chat/completions", b"{", 400, "the body is not JSON"),
        ("chat/completions", {"messages": []}, 400, "at least one message"),
        ("chat/completions", {"messages": [{"content": "x"}]}, 400, "each message must have a role"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "is not text"),
        ("chat/completions", {"messages": [USER], "max_tokens": 0}, 400, "whole number of at least 1"),
        ("completions", {"prompt": [1, -1]}, 400, "a list of token ids"),
        ("inference/v1/generate", {"token_ids": "x"}, 400, "a list of token ids"),
        ("embeddings", {}, 404, "unknown route 'embeddings'"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    route: str, body: Any, status: int, message: str, tmp_path: Path
) -> None:
    def agent(base_url: str, api_key: str) -> float:
        found, answer = post(base_url, api_key, route, body)
        assert (found, message in answer["error"]["message"]) == (status, True), answer
        chat(base_url, api_key, [USER])
        return 1.0

    assert run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path))["turns_N"].tolist() == [1]


def test_a_session_is_its_own_agents_alone(tmp_path: Path) -> None:
    known = []

    def agent(base_url: str, api_key: str) -> float:
        assert base_url.startswith("http://127.0.0.1:")
        assert post(base_url, "wrong", "chat/completions", {"messages": [USER]})[0] == 401
        assert post(base_url, "", "messages", {"messages": [USER]})[1]["error"]["type"] == "authentication_error"
        for other_url, other_key in known:
            assert post(other_url, other_key, "chat/completions", {"messages": [USER]})[0] in (410, 200)
            assert post(base_url, other_key, "chat/completions", {"messages": [USER]})[0] == 401
        known.append((base_url, api_key))
        chat(base_url, api_key, [USER])
        return 1.0

    run_agent(Echo(["ab"] * 4), agent, encoder(PLAIN, tmp_path), "one", "two")
    assert len({url for url, _ in known}) == len({key for _, key in known}) == 2


def test_a_limit_is_an_error_that_clients_do_not_repeat(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        answer = chat(base_url, api_key, [USER])
        status, found = post(base_url, api_key, "chat/completions", {"messages": [USER, answer, USER]})
        assert (status, found["error"]["code"]) == (400, "episode_over")
        return 0.75

    rollouts = run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path), limits=EpisodeLimits(turns=1))
    assert (rollouts.finish, rollouts["environment_rewards_NT"].sum().item()) == (["turns"], 0.75)


def test_a_client_that_goes_away_leaves_no_trace(tmp_path: Path) -> None:
    """It goes while the engine samples: the turn is asked for again with the same seed, and recorded once."""
    asked, sampling_begins, gone = [], threading.Event(), threading.Event()

    class Slow(Echo):
        def __call__(self, prompts: Any, sampling: Any) -> Any:
            asked.extend(prompts.uids)
            sampling_begins.set()
            if len(asked) == 1:
                assert gone.wait(60)
            return super().__call__(prompts, sampling)

    def agent(base_url: str, api_key: str) -> float:
        leave_early(base_url, api_key, "Hi", sampling_begins)
        gone.set()
        chat(base_url, api_key, [USER])
        return 1.0

    rollouts = run_agent(Slow(["never read", "ab"]), agent, encoder(PLAIN, tmp_path))
    assert rollouts.tokens_NT.tolist() == [[*b"ab", EOS]]
    assert asked == [10, 10]


def test_an_agent_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    late = threading.Event()

    def agent(base_url: str, api_key: str) -> float:
        chat(base_url, api_key, [USER])
        late.wait(60)
        return 1.0

    rollouts = run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path), seconds=2.0)
    late.set()
    assert (rollouts.finish, rollouts["environment_rewards_NT"].sum().item()) == (["seconds"], 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# real sampling
# ----------------------------------------------------------------------------------------------------------------------
