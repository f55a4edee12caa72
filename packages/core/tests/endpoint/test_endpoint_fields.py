"""Fields of requests: each is honored, changes nothing, or is refused in one line. None is dropped in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from endpoint_agents import PLAIN, Echo, chat, encoder, post, run_agent

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
NAMED = {"name": "add", "input_schema": {}}
ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [USER]},
    "completions": {"prompt": "Hi"},
    "messages": {"messages": [USER], "max_tokens": 100},
    "inference/v1/generate": {"token_ids": [72, 105]},
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat/completions", {"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls is False"),
    ("chat/completions", {"top_logprobs": 3, "logprobs": True}, "top_logprobs is 3"),
    ("chat/completions", {"functions": [{"name": "add"}]}, "functions is ["),
    ("chat/completions", {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs is {"),
    ("chat/completions", {"continue_final_message": True}, "continue_final_message is True"),
    ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort is 'high'"),
    ("chat/completions", {"modalities": ["text", "audio"]}, "modalities is ["),
    ("chat/completions", {"web_search_options": {}}, "web_search_options is {}"),
    ("chat/completions", {"temprature": 0.5}, "temprature is 0.5"),
    ("chat/completions", {"tools": [{"type": "web_search"}]}, "tool has the type 'web_search'"),
    ("completions", {"echo": True}, "echo is True"),
    ("completions", {"suffix": "end"}, "suffix is 'end'"),
    ("completions", {"logprobs": 5}, "logprobs is 5"),
    ("completions", {"truncate_prompt_tokens": 4}, "truncate_prompt_tokens is 4"),
    ("messages", {"mcp_servers": [{"name": "x"}]}, "mcp_servers is ["),
    ("messages", {"tools": [{"name": "s", "type": "web_search_20250305"}]}, "tool has the type 'web_search_20250305'"),
    ("messages", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "tool_choice is {"),
    ("messages", {"context_management": {"edits": []}}, "context_management is {"),
    ("messages", {"output_config": {"effort": "low"}}, "output_config is {"),
    ("inference/v1/generate", {"features": {}}, "features is {}"),
    ("inference/v1/generate", {"sampling_params": {"logprobs": 4}}, "logprobs is 4"),
    ("inference/v1/generate", {"sampling_params": {"truncate_prompt_tokens": 1}}, "truncate_prompt_tokens is 1"),
]
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {"tools": [TOOL], "parallel_tool_calls": True, "tool_choice": "auto"}),
    (
        "chat/completions",
        {"top_logprobs": 0, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"},
    ),
    (
        "chat/completions",
        {"chat_template_kwargs": {}, "functions": None, "modalities": ["text"], "verbosity": "medium"},
    ),
    ("chat/completions", {"prompt_cache_key": "a", "safety_identifier": "b", "stream_options": None}),
    ("completions", {"echo": False, "suffix": None, "logprobs": 1, "user": "u", "skip_special_tokens": True}),
    ("messages", {"metadata": {"user_id": "u"}, "thinking": {"type": "disabled"}, "mcp_servers": [], "system": "S"}),
    ("messages", {"tools": [{**NAMED, "type": "custom", "strict": True}]}),
    ("chat/completions", {"tools": [{**TOOL, "function": {"name": "add", "strict": True}}]}),
    ("messages", {"tools": [NAMED], "tool_choice": {"type": "auto", "disable_parallel_tool_use": False}}),
    (
        "inference/v1/generate",
        {"sampling_params": {"logprobs": 0, "detokenize": False, "output_kind": 2}, "priority": 1},
    ),
]


def asked(route: str, more: dict[str, Any], folder: Path, policy: Echo, **options: Any) -> tuple[int, Any]:
    """Return what a request of an agent is answered."""
    answers: list[tuple[int, Any]] = []

    def agent(base_url: str, api_key: str) -> float:
        root = base_url.removesuffix("/v1") if route.startswith("inference") else base_url
        answers.append(post(root, api_key, route, {**ROUTES[route], **more}))
        if answers[0][0] != 200:
            chat(base_url, api_key, [USER])
        return 1.0

    run_agent(policy, agent, encoder(PLAIN, folder), **options)
    return answers[0]


@pytest.mark.parametrize(("route", "more", "told"), REFUSED)
def test_a_field_that_would_be_dropped_is_refused(route: str, more: dict[str, Any], told: str, tmp_path: Path) -> None:
    policy = Echo(["ab"])
    status, answer = asked(route, more, tmp_path, policy)
    message = answer["error"]["message"]
    assert (status, message.count("\n")) == (400, 0), answer
    assert message.startswith(f"the request's {told}")
    assert "leave it out" in message
    assert message.endswith('environment.request_sampling = "ignore"')
    assert len(policy.read) == 1, "no turn was sampled for it"


@pytest.mark.parametrize(("route", "more", "told"), REFUSED)
def test_an_agent_that_cannot_be_changed_is_answered_without_them(
    route: str, more: dict[str, Any], told: str, tmp_path: Path
) -> None:
    assert asked(route, more, tmp_path, Echo(["ab"]), request_sampling="ignore")[0] == 200


@pytest.mark.parametrize(("route", "more"), HARMLESS)
def test_a_field_that_changes_nothing_is_accepted(route: str, more: dict[str, Any], tmp_path: Path) -> None:
    status, answer = asked(route, more, tmp_path, Echo(["ab"]))
    assert status == 200, answer


@pytest.mark.parametrize("choice", ["none", {"type": "none"}])
@pytest.mark.parametrize(("route", "tool"), [("chat/completions", TOOL), ("messages", NAMED)])
def test_tools_that_the_policy_may_not_call_are_not_shown_to_it(
    route: str, tool: dict[str, Any], choice: Any, tmp_path: Path
) -> None:
    for more, shown in (({"tool_choice": choice}, False), ({}, True)):
        policy = Echo(["ab"])
        assert asked(route, {"tools": [tool], **more}, tmp_path, policy)[0] == 200
        assert bytes(policy.read[0]).startswith(b"T1;") == shown


FAILED: list[tuple[dict[str, Any], bytes]] = [
    ({"content": "no such file", "is_error": True}, b"[t]Error: no such file"),
    (
        {"content": [{"type": "text", "text": "no "}, {"type": "text", "text": "file"}], "is_error": True},
        b"[t]Error: no file",
    ),
    ({"is_error": True}, b"[t]Error: "),
    ({"content": "2", "is_error": False}, b"[t]2"),
    ({"content": "2", "is_error": None}, b"[t]2"),
]


@pytest.mark.parametrize(("result", "read"), FAILED)
def test_the_policy_reads_that_a_tool_failed(result: dict[str, Any], read: bytes, tmp_path: Path) -> None:
    use = {"type": "tool_use", "id": "c", "name": "add", "input": {}}
    results = [{"type": "tool_result", "tool_use_id": "c", **result}]
    messages = [USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": results}]
    policy = Echo(["ab"])
    assert asked("messages", {"messages": messages, "tools": [NAMED]}, tmp_path, policy)[0] == 200
    assert bytes(token for token in policy.read[0] if token < 256).endswith(read + b"[a]")


def test_a_failure_that_is_neither_true_nor_false_is_refused(tmp_path: Path) -> None:
    results = [{"type": "tool_result", "tool_use_id": "c", "content": "2", "is_error": "no"}]
    status, answer = asked(
        "messages", {"messages": [USER, {"role": "user", "content": results}]}, tmp_path, Echo(["ab"])
    )
    assert (status, answer["error"]["message"]) == (400, 'is_error of a tool_result is "no", but must be true or false')
