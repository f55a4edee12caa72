"""Anthropic's wire format: messages, whole or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.endpoint.conversation import Answer, Conversation, message_of
from rlhf_core.endpoint.fields import MESSAGES, forbids_tools
from rlhf_core.endpoint.http import HttpError, encode_events, encode_json
from rlhf_core.endpoint.openai import MODEL
from rlhf_core.endpoint.sampling import read_options

__all__ = ["answer_messages", "count_tokens", "encode_error"]

REASONS = {"stop": "end_turn", "length": "max_tokens"}
"""Reasons for the end of a turn, in Anthropic's words."""
ERROR = "Error: "
"""Text before the result of a tool that failed: chat templates know no other mark."""


async def answer_messages(conversation: Conversation, body: Mapping[str, Any]) -> bytes:
    """Answer `POST /v1/messages`."""
    messages, tools = _chat(body)
    options = read_options(body, "max_tokens", stop="stop_sequences")
    conversation.check(body, MESSAGES)
    answer = await conversation.chat(messages, tools, options)
    blocks: list[dict[str, Any]] = (
        [{"type": "text", "text": answer.content}] if answer.content or not answer.calls else []
    )
    for call in message_of(answer).get("tool_calls", []):
        function = call["function"]
        blocks.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": json.loads(function["arguments"])}
        )
    message = {
        "id": f"msg-{answer.reply.turn}",
        "type": "message",
        "role": "assistant",
        "model": str(body.get("model") or MODEL),
        "content": blocks,
        "stop_reason": _reason(answer),
        "stop_sequence": answer.stop or None,
        "usage": {"input_tokens": len(answer.prompt_ids), "output_tokens": len(answer.reply.token_ids)},
    }
    return encode_events(_events(message)) if body.get("stream") else encode_json(200, message)


async def count_tokens(conversation: Conversation, body: Mapping[str, Any]) -> bytes:
    """Answer `POST /v1/messages/count_tokens`. Nothing is sampled."""
    return encode_json(200, {"input_tokens": conversation.count(*_chat(body))})


def _chat(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages and tools of a request in OpenAI's form."""
    messages, tools = body.get("messages"), body.get("tools") or []
    if not isinstance(messages, list) or not isinstance(tools, list):
        raise HttpError(400, "messages and tools must be lists")
    chat = [*_system(body), *(each for message in messages for each in _messages(message))]
    return chat, [] if forbids_tools(body) else [_tool(each) for each in tools]


def encode_error(status: int, message: str) -> bytes:
    """Return an error in Anthropic's form."""
    kind = {401: "authentication_error", 404: "not_found_error"}.get(status, "invalid_request_error")
    return encode_json(
        status, {"type": "error", "error": {"type": kind if status < 500 else "api_error", "message": message}}
    )


def _events(message: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the events of a message: its beginning, each block, and why it ended."""
    usage = message["usage"]
    begun = {
        **message,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage, "output_tokens": 0},
    }
    yield "message_start", {"type": "message_start", "message": begun}
    for i, block in enumerate(message["content"]):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield "content_block_start", {"type": "content_block_start", "index": i, "content_block": empty}
        yield "content_block_delta", {"type": "content_block_delta", "index": i, "delta": delta}
        yield "content_block_stop", {"type": "content_block_stop", "index": i}
    end = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
    yield "message_delta", {"type": "message_delta", "delta": end, "usage": {"output_tokens": usage["output_tokens"]}}
    yield "message_stop", {"type": "message_stop"}


def _reason(answer: Answer) -> str:
    if answer.calls:
        return "tool_use"
    return "stop_sequence" if answer.stop else REASONS[answer.reply.finish]


def _system(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the system prompt as a message, if there is one."""
    system = body.get("system")
    return [{"role": "system", "content": system}] if system else []


def _tool(tool: Any) -> dict[str, Any]:
    """Return the description of a tool in OpenAI's form."""
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
        raise HttpError(400, "each tool must have a name")
    function = {"name": tool["name"], "description": tool.get("description", "")}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema", {})}}


def _result(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a tool in OpenAI's form, which has no field for a failure: its text begins with `ERROR`."""
    content, failed = block.get("content"), block.get("is_error") or False
    if not isinstance(failed, bool):
        raise HttpError(400, f"is_error of a tool_result is {json.dumps(failed)}, but must be true or false")
    if failed and isinstance(content, list):
        content = [{"type": "text", "text": ERROR}, *content]
    elif failed and (content is None or isinstance(content, str)):
        content = ERROR + (content or "")
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _messages(message: Any) -> Sequence[dict[str, Any]]:
    """Return a message in OpenAI's form: results of tools are separate messages."""
    if not isinstance(message, Mapping) or message.get("role") not in ("user", "assistant"):
        raise HttpError(400, "each message must have the role user or assistant")
    content = message.get("content")
    if not isinstance(content, list):
        return [{"role": message["role"], "content": content}]
    results, calls, rest = [], [], []
    for block in content:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            results.append(_result(block))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            rest.append(block)
    whole = {"role": message["role"], "content": rest, **({"tool_calls": calls} if calls else {})}
    return [*results, whole] if rest or calls else results
