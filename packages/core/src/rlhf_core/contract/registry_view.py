"""The registry's facts: plugins, the names that they provide, and the plugins that failed to load.

`RegistryView` is the part of the registry that commands and ingredients may use.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf_core.errors import PluginError

__all__ = ["BrokenPlugin", "Plugin", "PluginSelection", "RegisteredProvider", "RegistryView", "failure_place"]


@dataclass(frozen=True)
class Plugin:
    """A plugin and where it comes from."""

    name: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@dataclass(frozen=True)
class PluginSelection:
    """The arguments with which another process makes an equal `Registry`."""

    autoload: bool = True
    """load the entry points of installed distributions"""
    blocked: tuple[str, ...] = ()
    """plugin names that are not loaded: `-p no:NAME`"""
    load: tuple[str, ...] = ()
    """entry points or modules to load regardless of `autoload`: `-p NAME`"""

    @property
    def words(self) -> list[str]:
        """The words of a command line that load and block them."""
        names = [*self.load, *(f"no:{name}" for name in self.blocked)]
        return [word for name in names for word in ("-p", name)]


@dataclass(frozen=True)
class RegisteredProvider:
    """One entry of a kind's table."""

    kind: str
    name: str
    target: type | str
    """the class, or `"module:Class"`"""
    plugin: Plugin

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} of {self.plugin}"


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that could not be loaded."""

    plugin: Plugin
    error: BaseException

    @property
    def reason(self) -> str:
        """Return the error as one line, with the file and line of the plugin that raised it."""
        text = " ".join(str(self.error).split())
        kind = "" if isinstance(self.error, PluginError) else f"{type(self.error).__name__}: "
        return f"{kind}{text}{failure_place(self.error)}"

    def __str__(self) -> str:
        return f"plugin {self.plugin.name!r} of {self.plugin} failed to load: {self.reason}"


def failure_place(error: BaseException) -> str:
    """Return ` (FILE, line N)` for the innermost line of the author's own code; empty if there is none.

    That is the first file outside host and standard library, or one of its package. Code that it calls may belong to a
    library, and a library may have replaced a function of Python, as wandb does with `sys.exit`.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        return ""  # Python's own text names them
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    outside = [(Path(file), line) for file, line in frames if not _is_host(file)]
    if not outside:
        return ""
    first = outside[0][0]
    package = first.parent if (first.parent / "__init__.py").exists() else first
    file, line = [place for place in outside if place[0].is_relative_to(package)][-1]
    return f" ({file.name}, line {line})"


def _is_host(file: str) -> bool:
    """Return True for a file of core, of pluggy, or of Python itself."""
    file = file.replace("\\", "/")
    is_library = file.startswith(sysconfig.get_paths()["stdlib"]) and "site-packages" not in file
    return is_library or any(part in file for part in ("/rlhf_core/", "/pluggy/", "<frozen "))


class RegistryView(Protocol):
    """The installed plugins and providers, as commands and ingredients see them."""

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """The loaded plugins by name."""
        ...

    @property
    def broken_plugins(self) -> Sequence[BrokenPlugin]:
        """The plugins that failed to load."""
        ...

    @property
    def selection(self) -> PluginSelection:
        """The arguments with which another process makes an equal registry."""
        ...

    @property
    def conflicts(self) -> Sequence[Sequence[RegisteredProvider]]:
        """The entries of every name that more than one plugin provides."""
        ...

    def table(self, kind: str) -> Mapping[str, RegisteredProvider]:
        """Return every name of a kind, sorted."""
        ...

    def resolve(self, kind: str, name: str) -> type[Any]:
        """Return the provider class called `name`, or the class that `module:Class` names."""
        ...

    def provenance(self, kind: str, name: str) -> Plugin:
        """Return the plugin that provides `name`."""
        ...

    def observers(self) -> Sequence[tuple[Plugin, str]]:
        """Return the plugins that have observer hooks, with their docstrings."""
        ...

    def metrics(self) -> Sequence[tuple[Plugin, str, str]]:
        """Return every documented metric: the plugin, the name, and `"unit: meaning"`."""
        ...
