"""Redact secrets: values of secret options, tokens of the environment, and credentials in URLs.

Lines of metrics and samples, error lines and tracebacks have secrets replaced wherever they are found, an ordinary word only
where it stands alone. `config.toml` has to repeat the run: secret options are masked there by their field, and of other values
only what addresses carry. Names of fields and numbers are never changed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

__all__ = ["MASK", "hide", "redact", "redact_addresses", "redact_tree", "show_traceback"]

MASK = "***"
"""Mask in place of a secret."""

SHORTEST = 8
"""A shorter value is no token, and would be found in innocent words."""

IN_ENVIRONMENT = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD|PASSWD|ACCESS_KEY)$", re.IGNORECASE)
"""Names of environment variables that hold secrets."""

USERINFO = re.compile(r"(?<=://)[^/\s@\"']+(?=@)")
QUERY = re.compile(
    r"(?<=[?&;])((?:[\w.-]*(?:token|key|secret|password|passwd|signature|sig|auth|credential)))=[^&;#\s\"']+",
    re.IGNORECASE,
)
"""Secrets in addresses: `user:password@`, and parameters that are named like secrets."""

_hidden: set[str] = set()


def hide(secret: str) -> str:
    """`secret`, which is never written by this process from here on."""
    if len(secret) >= SHORTEST:
        _hidden.update((secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]))
    return secret


def redact(text: str) -> str:
    """`text` without secrets; of those that are a word or a number, only where they are no part of a longer one."""
    named = {v for k, v in os.environ.items() if len(v) >= SHORTEST and IN_ENVIRONMENT.search(k)}
    for secret in sorted(_hidden | named, key=len, reverse=True):
        if secret not in text:
            continue
        if secret.isalpha() or secret.isdigit():
            text = re.sub(rf"(?<!\w)(?<!\d\.){re.escape(secret)}(?!\w)", MASK, text)
        else:
            text = text.replace(secret, MASK)
    return redact_addresses(text)


def redact_addresses(text: str) -> str:
    """`text` without the passwords and tokens that addresses in it carry."""
    return QUERY.sub(rf"\1={MASK}", USERINFO.sub(MASK, text)) if "://" in text else text


def redact_tree(value: Any, text: Callable[[str], str] = redact) -> Any:
    """Return a plain value with each text in it redacted by `text`; keys stay as they are."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: redact_tree(each, text) for key, each in value.items()}
    return [redact_tree(each, text) for each in value] if isinstance(value, (list, tuple)) else value


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a bug's traceback to stderr, redacted."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
