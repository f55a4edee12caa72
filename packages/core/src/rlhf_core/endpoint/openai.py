"""OpenAI's wire format: chat completions and completions, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_core.contract.driving import Policy
from rlhf_core.endpoint.conversation import Answer, Conversation, message_of
from rlhf_core.endpoint.fields import CHAT, COMPLETION, forbids_tools
from rlhf_core.endpoint.http import HttpError, encode_events, encode_json
from rlhf_core.endpoint.sampling import read_options
from rlhf_core.models.loading.limits import end_of_vocabulary

__all__ = ["MODEL", "answer_chat", "answer_completion", "describe_model", "list_models", "token_ids"]

MODEL = "policy"
"""The name of the model, for clients that want one; requests may name any other."""


async def answer_chat(conversation: Conversation, body: Mapping[str, Any]) -> bytes:
    """Answer `POST /v1/chat/completions`."""
    options = read_options(body, "max_completion_tokens", "max_tokens")
    messages, tools = body.get("messages"), body.get("tools") or []
    if not isinstance(messages, list) or not isinstance(tools, list):
        raise HttpError(400, "messages and tools must be lists")
    conversation.check(body, CHAT)
    answer = await conversation.chat(messages, [] if forbids_tools(body) else tools, options)
    head = _head(body, answer, "chat.completion")
    message = message_of(answer)
    choice = {"index": 0, "message": {**message, "refusal": None}, "finish_reason": _finish(answer)}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": _logprobs(conversation.policy, answer)}
    if body.get("return_token_ids"):
        choice["token_ids"] = list(answer.reply.token_ids)
        head["prompt_token_ids"] = list(answer.prompt_ids)
    if not body.get("stream"):
        return encode_json(200, {**head, "choices": [choice], "usage": _usage(answer)})
    return encode_events(_chat_events(body, head, choice, answer))


def _chat_events(
    body: Mapping[str, Any], head: Mapping[str, Any], choice: Mapping[str, Any], answer: Answer
) -> Iterator[tuple[str, Any]]:
    """Yield the events of an answer: who speaks, what, and why it ended."""
    head = {**head, "object": "chat.completion.chunk"}
    rest = {name: value for name, value in choice.items() if name not in ("message", "finish_reason")}

    def event(delta: Any, finish: str | None = None, more: Mapping[str, Any] | None = None) -> tuple[str, Any]:
        return "", {**head, "choices": [{"index": 0, **(more or {}), "delta": delta, "finish_reason": finish}]}

    yield event({"role": "assistant", "content": ""})
    yield event({"content": answer.content}, more=rest)
    calls = choice["message"].get("tool_calls", [])
    if calls:
        yield event({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
    yield event({}, choice["finish_reason"])
    options = body.get("stream_options")
    if isinstance(options, Mapping) and options.get("include_usage"):
        yield "", {**head, "choices": [], "usage": _usage(answer)}
    yield "", "[DONE]"


async def answer_completion(conversation: Conversation, body: Mapping[str, Any]) -> bytes:
    """Answer `POST /v1/completions`: a text, or token ids."""
    options = read_options(body, "max_tokens")
    conversation.check(body, COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        (prompt,) = prompt
    if isinstance(prompt, str):
        answer = await conversation.complete(prompt, options)
    else:
        ids = token_ids(conversation, prompt, "prompt")
        reply = await conversation.ask(ids, options)
        answer = Answer(reply, ids, reply.text, [])
    head = _head(body, answer, "text_completion")
    choice: dict[str, Any] = {
        "index": 0,
        "text": answer.content,
        "finish_reason": answer.reply.finish,
        "logprobs": None,
    }
    if body.get("logprobs") is not None:
        tokens = _logprobs(conversation.policy, answer)
        choice["logprobs"] = {
            "tokens": [each["token"] for each in tokens],
            "token_logprobs": [each["logprob"] for each in tokens],
        }
    if body.get("return_token_ids"):
        choice |= {"token_ids": list(answer.reply.token_ids), "prompt_token_ids": list(answer.prompt_ids)}
    whole = {**head, "choices": [choice], "usage": _usage(answer)}
    return encode_events([("", whole), ("", "[DONE]")]) if body.get("stream") else encode_json(200, whole)


def list_models() -> bytes:
    """Answer `GET /v1/models`."""
    return encode_json(200, {"object": "list", "data": [_model(MODEL)]})


def describe_model(name: str) -> bytes:
    """Answer `GET /v1/models/NAME`: requests may give the policy any name."""
    return encode_json(200, _model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rlhf"}


def token_ids(conversation: Conversation, given: Any, name: str) -> tuple[int, ...]:
    """Return token ids of a request. Raises `HttpError` if the tokenizer lacks one, which would end the engine."""
    if not isinstance(given, list) or not all(isinstance(each, int) and each >= 0 for each in given) or not given:
        raise HttpError(400, f"{name} must be a string, or a list of token ids")
    if max(given) >= (end := end_of_vocabulary(conversation.policy.encoder.tokenizer)):
        raise HttpError(400, f"{name} has the id {max(given)}, but the policy's tokens have ids below {end}")
    return tuple(given)


def _head(body: Mapping[str, Any], answer: Answer, kind: str) -> dict[str, Any]:
    """Return the fields that all answers have. No clock: an answer is the same whenever it is given."""
    return {"id": f"turn-{answer.reply.turn}", "object": kind, "created": 0, "model": str(body.get("model") or MODEL)}


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.calls else answer.reply.finish


def _usage(answer: Answer) -> dict[str, int]:
    prompt, new = len(answer.prompt_ids), len(answer.reply.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _logprobs(policy: Policy, answer: Answer) -> Sequence[dict[str, Any]]:
    """Return the sampled tokens with their log-probabilities; other candidates are not known."""
    found = []
    for number, logprob in zip(answer.reply.token_ids, answer.reply.logprobs, strict=True):
        text = str(policy.encoder.tokenizer.decode([number]))
        found.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return found
