"""Callbacks of a Python user, checked: functions by the observer hook that calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlhf_core.config.python_values import describe, function_name
from rlhf_core.contract import hooks
from rlhf_core.errors import UsageError
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["read_callbacks"]

HOOKS = tuple(name for name in hooks.OBSERVERS if name != "rlhf_watch")
"""The hooks that a function can be called at."""
USUAL = "rlhf_step_end"
"""The hook of a function that names none."""


def read_callbacks(value: Any) -> dict[str, tuple[Callable[..., Any], ...]]:
    """Return the functions of each hook.

    Args:
        value: a function, a list of functions, which are called after every step, or a dictionary of them by hook:
            `step_end`, `evaluated`, `run_start`, `run_end`, `rollouts_ready`, `before_update`.

    Raises:
        UsageError: a hook or an argument of a function is unknown, or a value is no function.
    """
    table = value if isinstance(value, Mapping) else {USUAL: value}
    found: dict[str, tuple[Callable[..., Any], ...]] = {}
    for name, functions in table.items():
        hook = name if str(name).startswith("rlhf_") else f"rlhf_{name}"
        if hook not in HOOKS:
            short = [each.removeprefix("rlhf_") for each in HOOKS]
            raise UsageError(
                f"callbacks: no hook is called {name!r}{did_you_mean(str(name), short)}; hooks are {', '.join(short)}"
            )
        several = functions if isinstance(functions, (list, tuple)) else (functions,)
        for function in several:
            _check(function, hook)
        found[hook] = tuple(several)
    return found


def _check(function: Any, hook: str) -> None:
    """Check that a function takes what its hook passes."""
    if isinstance(function, type) or not callable(function):
        raise UsageError(
            f"callbacks: {describe(function)} is not a function; pass f(run, step, metrics), or {{hook: f}}"
        )
    known = list(inspect.signature(getattr(hooks, hook)).parameters)
    for name in _required(function):
        if name not in known:
            raise UsageError(
                f"callbacks: {function_name(function)} asks for {name!r}, but {hook.removeprefix('rlhf_')} passes "
                f"only {', '.join(known)}"
            )


def _required(function: Callable[..., Any]) -> Iterator[str]:
    """The arguments that a function must be given; one that is positional only cannot be named."""
    for each in inspect.signature(function).parameters.values():
        if each.kind is each.POSITIONAL_ONLY or (
            each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ):
            yield each.name
