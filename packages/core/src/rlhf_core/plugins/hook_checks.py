"""Checks of a plugin's hooks, and a note on an exception that names the plugin whose hook raised it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pluggy

from rlhf_core.contract.hooks import GROUP, KINDS, METRICS, OBSERVERS
from rlhf_core.errors import PluginError
from rlhf_core.util.suggestions import closest_names, or_list

__all__ = ["check_marked", "name_the_culprit", "place_of", "unknown_hook"]

HOOKS = (*(f"rlhf_{kind}" for kind in KINDS), METRICS, *OBSERVERS)
"""Attributes that a plugin may have."""


def check_marked(plugin: object) -> None:
    """A function that is named like a hook but not marked would be ignored in silence."""
    for name in HOOKS:
        function = getattr(plugin, name, None)
        if isinstance(function, (FunctionType, MethodType)) and not hasattr(function, f"{GROUP}_impl"):
            raise PluginError(f"{name}() lacks @hookimpl (from rlhf_core import hookimpl){place_of(function)}")


def unknown_hook(plugin: object) -> str:
    """Describe the marked function of the plugin that no specification knows."""
    for name in dir(plugin):
        function = getattr(plugin, name)
        if hasattr(function, f"{GROUP}_impl") and name not in HOOKS:
            words = {
                hook.removeprefix("rlhf_"): hook for hook in HOOKS
            }  # the common prefix makes everything look alike
            close = [words[each] for each in closest_names(name.removeprefix("rlhf_"), words)]
            meant = f" (did you mean {or_list(close)}?)" if close else f"; hooks are {', '.join(HOOKS)}"
            return f"{name}() is not a hook{meant}{place_of(function)}"
    return ""


def place_of(function: Any) -> str:
    """Return ` (FILE, line N)` of a function; empty if it has no code."""
    code = getattr(function, "__code__", None)
    return f" ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code is not None else ""


def name_the_culprit(outcome: pluggy.Result[Any], hook: str, implementations: Sequence[Any], _: object) -> None:
    """Note on an exception out of a hook which plugin raised it; pluggy does not report it."""
    error = outcome.exception
    trace = error.__traceback__ if error is not None else None
    while trace is not None:
        for implementation in implementations:
            if getattr(implementation.function, "__code__", None) is trace.tb_frame.f_code:
                assert error is not None
                name = implementation.plugin_name
                error.add_note(f"in {hook}() of {name if name.startswith('observer ') else f'the plugin {name!r}'}")
                return
        trace = trace.tb_next
