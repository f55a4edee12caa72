"""What is secret is never written: values of secret options, tokens of the environment, and what addresses carry.

Everything that a run writes as text passes here: config.toml, its lines of metrics and samples, error lines, tracebacks.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

__all__ = ["MASK", "hide", "redact", "redact_tree", "show_traceback"]

MASK = "***"
"""What is written for a secret."""

SHORTEST = 8
"""A shorter value is no token, and would be found in innocent words."""

IN_ENVIRONMENT = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD|PASSWD|ACCESS_KEY)$", re.IGNORECASE)
"""Names of environment variables that hold secrets."""

USERINFO = re.compile(r"(?<=://)[^/\s@\"']+(?=@)")
QUERY = re.compile(
    r"(?<=[?&;])((?:[\w.-]*(?:token|key|secret|password|passwd|signature|sig|auth|credential)))=[^&;#\s\"']+",
    re.IGNORECASE,
)
"""What addresses carry: `user:password@`, and parameters that are named like secrets."""

_hidden: set[str] = set()


def hide(secret: str) -> str:
    """`secret`, which is never written by this process from here on."""
    if len(secret) >= SHORTEST:
        _hidden.update((secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]))
    return secret


def redact(text: str) -> str:
    """`text` without secrets."""
    named = {v for k, v in os.environ.items() if len(v) >= SHORTEST and IN_ENVIRONMENT.search(k)}
    for secret in sorted(_hidden | named, key=len, reverse=True):
        text = text.replace(secret, MASK)
    return QUERY.sub(rf"\1={MASK}", USERINFO.sub(MASK, text)) if "://" in text else text


def redact_tree(value: Any) -> Any:
    """A plain value with every text in it redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_tree(each) for key, each in value.items()}
    return [redact_tree(each) for each in value] if isinstance(value, list) else value


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a bug leaves on stderr: Python's own traceback, redacted."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
