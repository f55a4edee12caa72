"""`"module:Class"`: what it may look like, and from it to the class."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_core.errors import PluginError, UsageError, run_option
from rlhf_core.util.messages import log
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["add_working_folder", "check_module_name", "check_provided", "load", "load_local", "report_no_hook"]

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
        raise PluginError(
            f"rlhf_{kind}() gives {name!r} as {target!r}, which is neither a dataclass nor 'module:Class'"
        )


def load(target: str) -> Any:
    """Import the object that `"module:Class"` names."""
    module, _, name = target.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def load_local(kind: str, target: str) -> Any:
    """Import the object that the user's `module:Class` names. Errors inside the user's module pass through."""
    module, _, name = target.partition(":")
    if not TARGET.fullmatch(target):
        raise UsageError(f"{run_option(kind)} {target}: expected a provider's name or module:Class")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"{run_option(kind)} {target}: no module is called {error.name!r} in the working folder or the environment"
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


def check_module_name(name: str) -> None:
    """Check that `-p NAME` may name a module, which a path does not.

    Raises:
        UsageError: it may not.
    """
    is_file = name.endswith(".py") and os.path.isfile(name)  # noqa: PTH113  # pathlib's raises for names that are too long
    if all(part.isidentifier() for part in name.split(".")) and not is_file:
        return
    there = is_file or os.path.isdir(name)  # noqa: PTH112  # the same
    name_it = f": use -p {Path(name).stem}, with its folder as working folder or in PYTHONPATH" if there else ""
    raise UsageError(f"-p {name}: give a plugin's module or entry point, not a path{name_it}")


def report_no_hook(module: ModuleType, name: str) -> None:
    """Log that the module of `-p NAME` has no hook, so that importing it was all.

    Raises:
        PluginError: it is a folder without `__init__.py`, in which nothing was imported.
    """
    hooks = "has no hook (a function rlhf_…() with @hookimpl)"
    if module.__spec__ is not None and module.__spec__.origin is None:
        raise PluginError(f"it is a folder without __init__.py, and {hooks}")
    log.warning(f"-p {name}: the module {hooks}; it was only imported")
