"""A conversation of an episode that an adapter drives, and what the adapters share."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_core import Example, Feedback, Policy, Reply, UsageError

__all__ = ["Dialogue", "find_name", "load_file", "require"]


class Dialogue:
    """Ids that grow by turns of the policy and by what it is told.

    Args:
        policy: of the episode.
        example: what the conversation begins with.
    """

    def __init__(self, policy: Policy, example: Example) -> None:
        row = policy.encoder.prompt_row(example)
        self.policy, self.example = policy, example
        self.ids, self.text = list(row.ids), row.text
        self.reply: Reply | None = None

    async def turn(self, max_tokens: int = 0, stop: Sequence[str] = (), seed: int | None = None) -> Reply:
        """Let the policy write; `Policy.ask` describes the options."""
        self.reply = await self.policy.ask(self.ids, max_tokens, stop, seed)
        self.ids += self.reply.token_ids
        self.text += self.reply.text
        return self.reply

    def tell(self, feedback: Feedback) -> None:
        """Add what the policy reads next."""
        turn = self.reply.token_ids if self.reply is not None else ()
        self.ids += self.policy.encoder.feedback(self.example, feedback, turn)
        self.text += feedback.text


def load_file(path: str, name: str) -> ModuleType:
    """Import a file of the user's as the module `name`. Raises `UsageError` if there is none."""
    file = Path(path)
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_name(place: str) -> Any:
    """Return what `file.py:name` or `module:name` names. Raises `UsageError` if there is no such thing."""
    path, _, name = place.rpartition(":")
    module = (
        load_file(path, Path(path).stem)
        if path.endswith(".py")
        else require(path, f"the package of {path}, or give a file")
    )
    if name not in vars(module):
        raise UsageError(f"{path} has no {name!r}; it has {', '.join(n for n in vars(module) if n[0] != '_')}")
    return vars(module)[name]


def require(module: str, package: str) -> ModuleType:
    """Import a module of a package that the user installs."""
    try:
        found: ModuleType = pkgutil.resolve_name(module)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import {module}: {error}; install {package}") from None
