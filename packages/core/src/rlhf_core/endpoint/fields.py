"""Fields of a request: those that the endpoint reads, those that change nothing, and those that it does not support.

An agent that is answered as if it had not sent a field gets another answer than it asked for. So each field is known here. A
request with any other is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_core.endpoint.http import HttpError
from rlhf_core.endpoint.sampling import NEUTRAL, OWN
from rlhf_core.errors import UsageError, run_option

__all__ = [
    "CHAT",
    "COMPLETION",
    "GENERATE",
    "MESSAGES",
    "RESPONSES",
    "SAMPLING_PARAMS",
    "Fields",
    "check_fields",
    "forbids_tools",
]

UNCHANGED = frozenset({"model", "stream", "metadata", "service_tier", "request_id", "priority", "cache_salt"})
"""Fields of every route: the form of the answer, and notes for a provider that has nothing to do with them here."""

TEXT: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
}
"""Options of vLLM that change what is read or returned, with the values that do not."""


@dataclass(frozen=True)
class Fields:
    """Fields of the requests of one route."""

    known: frozenset[str]
    """those that are read, and those that change nothing"""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """those that are not supported, with the values that change nothing"""
    tool_type: str = ""
    """the only type of tools, where there are some"""


CHAT = Fields(
    UNCHANGED
    | {"messages", "tools", "max_completion_tokens", "max_tokens", "n", "best_of", "seed", "stop", "stream_options"}
    | {"logprobs", "return_token_ids", "user", "store", "safety_identifier", "prediction"}
    | {"prompt_cache_key", "prompt_cache_retention"},
    {
        **TEXT,
        "add_generation_prompt": (True,),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "documents": ([],),
        "function_call": ("auto", "none"),
        "functions": ([],),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "top_logprobs": (0,),
    },
    "function",
)
COMPLETION = Fields(
    UNCHANGED | {"prompt", "max_tokens", "n", "best_of", "seed", "stop", "stream_options", "return_token_ids", "user"},
    {**TEXT, "add_special_tokens": (True,), "logprobs": (0, 1), "suffix": ("",)},
)
MESSAGES = Fields(
    UNCHANGED | {"messages", "system", "tools", "max_tokens", "seed", "n", "best_of", "stop_sequences"},
    {"mcp_servers": ([],)},
    "custom",
)
RESPONSES = Fields(
    UNCHANGED
    | {"input", "instructions", "tools", "max_output_tokens", "previous_response_id", "seed", "stop", "n", "best_of"}
    | {"store", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "stream_options"},
    {
        "background": (False,),
        "conversation": (),
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "text": ({}, {"format": {"type": "text"}}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    },
    "function",
)
GENERATE = Fields(UNCHANGED | {"token_ids", "sampling_params", "stream_options"})
SAMPLING_PARAMS = Fields(
    frozenset({"max_tokens", "n", "best_of", "seed", "stop", "output_kind", "detokenize", "skip_clone"})
    | {"skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"},  # nothing is text here
    {"logprobs": (0, 1), "prompt_logprobs": (), "truncate_prompt_tokens": (), "flat_logprobs": (False,)},
)


def check_fields(body: Mapping[str, Any], fields: Fields) -> None:
    """Check that a request has no field that the endpoint would drop.

    Args:
        body: the request, or the part of it that has the sampling options.
        fields: of its route.

    Raises:
        HttpError: a tool has a wrong form.
        UsageError: it has one.
    """
    for name, value in body.items():
        neutral = fields.fixed.get(name, ())
        elsewhere = name in fields.known or name in NEUTRAL or name in OWN
        if value is not None and value not in neutral and (name in fields.fixed or not elsewhere):
            raise _refusal(f"{name} is {value!r:.60}")
    for tool in body.get("tools") or () if fields.tool_type else ():
        _check_tool(tool, fields.tool_type)


def _check_tool(tool: Any, only: str) -> None:
    """Check that a tool is a function of the agent. Its `strict` is accepted, since SDKs set it by default."""
    if not isinstance(tool, Mapping):
        raise HttpError(400, f"each tool must be an object, not {tool!r:.60}")
    if (kind := tool.get("type") or only) != only:
        raise _refusal(f"tool has the type {kind!r:.60}")


def _refusal(what: str) -> UsageError:
    """Return the error of a field that the endpoint would drop."""
    other = run_option("environment.request_sampling", "ignore")
    return UsageError(f"the request's {what}, which the endpoint does not support; leave it out, or pass {other}")


def forbids_tools(body: Mapping[str, Any]) -> bool:
    """Return True if a request has tools that the policy is not to call."""
    choice = body.get("tool_choice")
    return choice == "none" or (isinstance(choice, Mapping) and choice.get("type") == "none")
