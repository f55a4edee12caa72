"""OpenAI's Responses API: items in, items out, whole or as server-sent events.

Items of a turn of the policy, its text and its calls, are one message of the chat. A request that names a previous response
continues the chat of it, which the session remembers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.endpoint.conversation import Answer, Conversation, message_of
from rlhf_core.endpoint.fields import RESPONSES, forbids_tools
from rlhf_core.endpoint.http import HttpError, encode_events, encode_json
from rlhf_core.endpoint.openai import MODEL
from rlhf_core.endpoint.sampling import read_options

__all__ = ["answer_response"]

DROPPED = ("reasoning",)
"""Items that clients send back and that the policy does not read: it wrote none of them."""

Message = dict[str, Any]
Item = Mapping[str, Any]


async def answer_response(conversation: Conversation, body: Mapping[str, Any]) -> bytes:
    """Answer `POST /v1/responses`."""
    options = read_options(body, "max_output_tokens")
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise HttpError(400, "tools must be a list")
    conversation.check(body, RESPONSES)
    chat = [*_earlier(conversation, body), *_messages(body.get("input"))]
    system = body.get("instructions")
    begun = [{"role": "system", "content": system}] if system else []
    described = [] if forbids_tools(body) else [_tool(each) for each in tools]
    answer = await conversation.chat([*begun, *chat], described, options)
    response = _response(body, answer)
    conversation.responses[response["id"]] = (*chat, message_of(answer))
    return encode_events(_events(response)) if body.get("stream") else encode_json(200, response)


def _earlier(conversation: Conversation, body: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the chat that a request continues, without its instructions, which each request gives anew."""
    previous = body.get("previous_response_id")
    if previous is None:
        return ()
    if not isinstance(previous, str) or previous not in conversation.responses:
        raise HttpError(
            404, f"previous_response_id {previous!r:.60} is not the id of a response in this session", "not_found"
        )
    return conversation.responses[previous]


def _messages(given: Any) -> list[Message]:
    """Return the input as messages of a chat."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise HttpError(400, "input must be a string, or a list of items")
    messages: list[Message] = []
    for item in given:
        kind = (item.get("type") or "message") if isinstance(item, Mapping) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            if not isinstance(item.get("name"), str):
                raise HttpError(400, "each function_call must have a name")
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind not in DROPPED:
            raise HttpError(400, f"input has an item of the type {kind!r:.60}, which the endpoint does not support")
    return messages


def _tool(tool: Any) -> Message:
    """Return the description of a tool in the form of chat completions."""
    if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str):
        raise HttpError(400, "each tool must have a name")
    function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _response(body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """Return an answer as a response. No clock: it is the same whenever it is given."""
    cut = answer.reply.finish == "length"
    sampled, read = len(answer.reply.token_ids), len(answer.prompt_ids)
    return {
        "id": f"resp_{answer.reply.turn}",
        "object": "response",
        "created_at": 0,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "model": str(body.get("model") or MODEL),
        "instructions": body.get("instructions"),
        "previous_response_id": body.get("previous_response_id"),
        "output": _output(answer, "incomplete" if cut else "completed"),
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": True,
        "metadata": body.get("metadata") or {},
        "usage": {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + sampled,
        },
    }


def _output(answer: Answer, status: str) -> list[dict[str, Any]]:
    """Return the items of a turn: its text, and its calls."""
    turn = answer.reply.turn
    text = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
    message = {
        "type": "message",
        "id": f"msg_{turn}",
        "status": status,
        "role": "assistant",
        "content": [text],
    }
    calls = [
        {"type": "function_call", "id": f"fc_{turn}_{i}", "call_id": call["id"], "status": status, **call["function"]}
        for i, call in enumerate(message_of(answer).get("tool_calls", []))
    ]
    return [message, *calls] if answer.content or not calls else calls


def _events(response: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the events of a response, numbered."""
    for number, (name, content) in enumerate(_stages(response)):
        yield name, {"type": name, "sequence_number": number, **content}


def _stages(response: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield its beginning, each item with its parts, and its end."""
    begun = {**response, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for i, item in enumerate(response["output"]):
        empty: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        added = {**item, **empty, "status": "in_progress"}
        yield "response.output_item.added", {"output_index": i, "item": added}
        yield from _parts({"item_id": item["id"], "output_index": i}, item)
        yield "response.output_item.done", {"output_index": i, "item": item}
    yield f"response.{response['status']}", {"response": response}


def _parts(where: Mapping[str, Any], item: Item) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what an item holds: the text of a message, or the arguments of a call."""
    if item["type"] == "function_call":
        arguments = item["arguments"]
        yield "response.function_call_arguments.delta", {**where, "delta": arguments}
        yield "response.function_call_arguments.done", {**where, "name": item["name"], "arguments": arguments}
        return
    parts: Sequence[Mapping[str, Any]] = item["content"]
    for k, part in enumerate(parts):
        place = {**where, "content_index": k}
        yield "response.content_part.added", {**place, "part": {**part, "text": ""}}
        yield "response.output_text.delta", {**place, "delta": part["text"], "logprobs": []}
        yield "response.output_text.done", {**place, "text": part["text"], "logprobs": []}
        yield "response.content_part.done", {**place, "part": part}
