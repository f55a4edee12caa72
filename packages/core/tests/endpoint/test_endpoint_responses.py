"""The Responses API against transcripts written by hand, and OpenAI's client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from endpoint_agents import EOS, PLAIN, Echo, encoder, post, run_agent

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TWICE = [*b"T1;[u]Hi[a]", *f"So:{CALL}".encode(), EOS, *b"[t]2[a]"]
"""Ids that the policy reads in the second turn, if nothing it wrote is encoded again."""


@pytest.mark.parametrize("form", ["items", "previous", "stream"])
def test_openais_client_needs_no_change(form: str, tmp_path: Path) -> None:
    """A call of a tool and its result: as items sent back, by the id of the response, and from a stream."""
    openai = pytest.importorskip("openai")

    def agent(base_url: str, api_key: str) -> float:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
        if form == "stream":
            with client.responses.stream(model="x", input="Hi", tools=[TOOL]) as events:
                kinds = [event.type for event in events]
                answer = events.get_final_response()
            assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
            assert kinds.count("response.function_call_arguments.delta") == 1
        else:
            answer = client.responses.create(model="x", input="Hi", tools=[TOOL], text={"format": {"type": "text"}})
        assert (answer.status, answer.output_text) == ("completed", "So:")
        called = answer.output[1]
        assert (called.name, called.arguments) == ("add", '{"a": 1}')
        assert answer.usage.output_tokens == len(f"So:{CALL}") + 1
        result = {"type": "function_call_output", "call_id": called.call_id, "output": "2"}
        if form == "previous":
            more: dict[str, Any] = {"previous_response_id": answer.id, "input": [result]}
        else:
            more = {"input": [USER, *(item.to_dict() for item in answer.output), result]}
        again = client.responses.create(model="x", tools=[TOOL], **more)
        assert again.output_text == "Two" and again.id != answer.id
        with pytest.raises(openai.NotFoundError, match="is not the id of a response in this session"):
            client.responses.create(model="x", input="Hi", previous_response_id="resp_99")
        with pytest.raises(openai.BadRequestError, match="web_search"):
            client.responses.create(model="x", input="Hi", tools=[{"type": "web_search"}])
        return 1.0

    policy = Echo([f"So:{CALL}", "Two"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read[1] == TWICE
    assert rollouts["segments_N"].tolist() == [1] and rollouts["turns_N"].tolist() == [2]


def test_instructions_are_given_anew_and_begin_another_context(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        _, first = post(base_url, api_key, "responses", {"input": [USER], "instructions": "A"})
        _, second = post(base_url, api_key, "responses", {"input": "Go", "previous_response_id": first["id"]})
        assert second["instructions"] is None
        return 1.0

    policy = Echo(["ab", "c"])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path))
    assert policy.read == [[*b"[s]A[u]Hi[a]"], [*b"[u]Hi[a]ab", EOS, *b"[u]Go[a]"]]
    assert rollouts["segments_N"].tolist() == [2]


def test_a_turn_that_is_cut_is_incomplete(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        asked = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "max_output_tokens": 2}
        _, answer = post(base_url, api_key, "responses", asked)
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert answer["output"][0]["content"][0]["text"] == "ab"
        _, events = post(base_url, api_key, "responses", {**asked, "stream": True})
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        assert events[-1]["type"] == "response.incomplete"
        assert [each["delta"] for each in events if each["type"] == "response.output_text.delta"] == ["cd"]
        return 1.0

    run_agent(Echo(["abcd", "cdef"]), agent, encoder(PLAIN, tmp_path))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": 3}, "input must be a string, or a list of items"),
        ({"input": []}, "at least one message"),
        ({"input": [3]}, "item of the type None"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item of the type 'item_reference'"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "each function_call must have a name"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads only text"),
        ({"input": "Hi", "tools": "add"}, "tools must be a list"),
        ({"input": "Hi", "tools": [{"type": "function"}]}, "each tool must have a name"),
        ({"input": "Hi", "text": {"format": {"type": "json_object"}}}, "text is"),
        ({"input": "Hi", "reasoning": {"effort": "high"}}, "reasoning is"),
        ({"input": "Hi", "temperature": 0.5}, "temperature is 0.5"),
        ({"input": "Hi", "background": True}, "background is True"),
        ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens must be"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused(body: dict[str, Any], message: str, tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        status, answer = post(base_url, api_key, "responses", body)
        assert (status, message in answer["error"]["message"]) == (400, True), answer
        post(base_url, api_key, "responses", {"input": "Hi"})
        return 1.0

    run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path))
