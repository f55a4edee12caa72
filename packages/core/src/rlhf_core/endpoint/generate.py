"""vLLM's token-in, token-out route: `POST /inference/v1/generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_core.endpoint.conversation import Conversation
from rlhf_core.endpoint.fields import GENERATE, SAMPLING_PARAMS
from rlhf_core.endpoint.http import HttpError, encode_events, encode_json
from rlhf_core.endpoint.openai import MODEL, token_ids
from rlhf_core.endpoint.sampling import read_options

__all__ = ["answer_generate"]


async def answer_generate(conversation: Conversation, body: Mapping[str, Any]) -> bytes:
    """Answer with the token ids of a turn, and with their log-probabilities if `sampling_params` asks for some."""
    how = body.get("sampling_params") or {}
    if not isinstance(how, Mapping):
        raise HttpError(400, "sampling_params must be an object")
    options = read_options(how, "max_tokens")
    conversation.check(how, SAMPLING_PARAMS)
    conversation.check(body, GENERATE)
    ids = token_ids(conversation, body.get("token_ids"), "token_ids")
    reply = await conversation.ask(ids, options)
    choice: dict[str, Any] = {"index": 0, "finish_reason": reply.finish, "token_ids": list(reply.token_ids)}
    if how.get("logprobs") is not None:
        choice["logprobs"] = {
            "content": [
                {"token_id": number, "logprob": logprob, "top_logprobs": []}
                for number, logprob in zip(reply.token_ids, reply.logprobs, strict=True)
            ]
        }
    usage = {
        "prompt_tokens": len(ids),
        "completion_tokens": len(reply.token_ids),
        "total_tokens": len(ids) + len(reply.token_ids),
    }
    whole = {
        "request_id": str(body.get("request_id") or f"turn-{reply.turn}"),
        "model": str(body.get("model") or MODEL),
        "output_mode": "tokens",
        "choices": [choice],
        "usage": usage,
    }
    return encode_events([("", whole), ("", "[DONE]")]) if body.get("stream") else encode_json(200, whole)
