"""`"module:Class"`: what it may look like, and from it to the class."""

from __future__ import annotations

import re
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_core.errors import PluginError, UsageError, run_option
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["add_working_folder", "check_provided", "load", "load_local"]

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*")
"""A provider's name: no colon, comma or space, which mean something on the command line."""

TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def check_provided(kind: str, name: object, target: object) -> None:
    """Check an entry of a plugin's table. Raises PluginError."""
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise PluginError(f"rlhf_{kind}() gives the name {name!r}; names are letters, digits and _ . + -")
    if isinstance(target, str):
        if not TARGET.fullmatch(target):
            raise PluginError(f"rlhf_{kind}() gives {name!r} as {target!r}, which is not 'module:Class'")
    elif not (isinstance(target, type) and is_dataclass(target)):
        raise PluginError(f"rlhf_{kind}() gives {name!r} as {target!r}, neither a dataclass nor 'module:Class'")


def load(target: str) -> Any:
    """What `"module:Class"` names."""
    module, _, name = target.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def load_local(kind: str, target: str) -> Any:
    """What the user's `module:Class` names. An error inside the user's module stays what it is."""
    module, _, name = target.partition(":")
    if not TARGET.fullmatch(target):
        raise UsageError(f"{run_option(kind)} {target}: expected a provider's name or module:Class")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"{run_option(kind)} {target}: no module is called {error.name!r} here or in the environment"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{run_option(kind)} {target}: {module} has no {part!r}{did_you_mean(part, vars(found))}")
        found = getattr(found, part)
    return found


def add_working_folder() -> None:
    """Let modules of the working folder be imported, before installed ones."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
