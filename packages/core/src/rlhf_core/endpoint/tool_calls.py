"""Calls of tools inside a turn: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Qwen and Hermes write them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["ToolCall", "find_tool_calls"]

CALL = re.compile(r"\s*<tool_call>(.*?)</tool_call>\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call."""

    name: str
    arguments: dict[str, Any]


def find_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Return the text around the calls, and the calls; a call that is no JSON stays in the text."""
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        try:
            content = json.loads(found[1])
        except ValueError:
            return found[0]
        arguments = content.get("arguments", content.get("parameters", {})) if isinstance(content, dict) else None
        if not isinstance(arguments, dict) or not isinstance(content.get("name"), str):
            return found[0]
        calls.append(ToolCall(content["name"], arguments))
        return ""

    return CALL.sub(take, text), calls
