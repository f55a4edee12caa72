"""Values as tables and OpenAI's API hold them, made into what templates read: numbers for text, JSON text for mappings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["kind_of", "plain_number", "tool_calls", "tools", "without_nulls"]


def plain_number(value: Any) -> str | None:
    """Return a number as text, None if `value` is none. A whole one has no point: empty cells make 7 into 7.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else repr(value)


def without_nulls(value: Any) -> Any:
    """Return the value without the keys that a table has filled with null inside of it, where rows have different keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, (list, tuple)) else value


def tools(value: Any) -> list[Any]:
    """Return functions that the assistant may call: a list, or JSON text of one, as tables hold it.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str):
        found = without_nulls(value)
    else:
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if not isinstance(found, list):
        raise ValueError("'tools' should be a list of functions, or JSON text of one")
    return found


def tool_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return an assistant's message whose calls have mappings as arguments: OpenAI's API gives JSON text of them.

    A `function_call` of its older form becomes a call.

    Raises:
        ValueError: the arguments are no JSON text of an object.
    """
    filled = dict(message)
    if isinstance(old := filled.pop("function_call", None), Mapping):
        filled["tool_calls"] = [{"type": "function", "function": old}]
    calls = filled.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        filled["tool_calls"] = [_call(call) for call in calls]
    return filled


def kind_of(value: Any) -> str:
    """Return the name of a value's type, for messages."""
    return "null" if value is None else type(value).__name__


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        raise ValueError(f"a tool call should be an object, not {kind_of(call)}")
    if isinstance(call.get("function"), Mapping):
        return {**without_nulls(call), "function": _call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"the arguments of the tool call {call.get('name')!r} should be an object, or JSON text of one, "
                f"not {call['arguments']!r:.60}"
            )
        return {**without_nulls({**call, "arguments": {}}), "arguments": arguments}
    return without_nulls(call)
