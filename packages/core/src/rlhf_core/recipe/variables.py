"""Variables of a recipe file: values that its user chooses, written `{name}` in the texts of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.config.value_types import from_words
from rlhf_core.errors import UsageError
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["fill", "read_variables"]

RESERVED = ("t", "total_T")
"""Names that each step fills in."""


def read_variables(path: Path, table: Any, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of all variables of a file.

    Args:
        path: the file, for messages.
        table: its [variables]: texts, numbers and booleans by name.
        given: values that take their place, as texts; each must be of the same type.

    Raises:
        UsageError: a value is of another type, or the file has no such variable.
    """
    if not isinstance(table, Mapping):
        raise UsageError(f"{path}: variables must be a table, not {table!r}")
    for name, value in table.items():
        if name in RESERVED or type(value) not in (str, int, float, bool):
            reserved = f"{' and '.join(RESERVED)} are reserved, since each step sets them"
            raise UsageError(f"{path}: variables.{name} must be a string, a number or a boolean; {reserved}")
    values = dict(table)
    for name, text in given.items():
        if name not in values:
            known = f"; it has {', '.join(values)}" if values else ""
            raise UsageError(f"{path} has no variable {name!r}{did_you_mean(name, values)}{known}")
        kind = type(values[name])
        try:
            values[name] = from_words(kind, [text])
        except ValueError:
            raise UsageError(f"{path}: the variable {name} must be of type {kind.__name__}, not {text!r}") from None
    return values


def fill(value: Any, values: Mapping[str, Any]) -> Any:
    """Return a value of TOML with `{name}` filled in at any depth; a text that is `{name}` alone becomes the value itself."""
    if isinstance(value, str):
        for name, each in values.items():
            if value == f"{{{name}}}":
                return each
        return re.sub(r"\{(\w+)\}", lambda found: str(values.get(found[1], found[0])), value)
    if isinstance(value, Mapping):
        return {key: fill(each, values) for key, each in value.items()}
    return [fill(each, values) for each in value] if isinstance(value, list) else value
