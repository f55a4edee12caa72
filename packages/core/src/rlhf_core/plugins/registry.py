"""Registry of plugins and of the class of each name.

Plugins are the built-in modules and the entry points of the group `rlhf`, loaded one at a time: one that fails is kept
in `broken_plugins` with its distribution and exception; the others are loaded. Provider hooks are asked once, here; afterwards
names are looked up in plain tables. A clash of two distributions over one name matters only to users who choose it.

`PLUGIN/NAME` is the name as that plugin provides it: `core/length` is core's own, even if others have a `length`.

    RLHF_DISABLE_PLUGIN_AUTOLOAD=1   load no entry point but those asked for with `-p NAME`
    RLHF_STRICT_PLUGINS=1            raise `PluginError` where a plugin would be listed as broken (for authors and CI)

Nothing here imports torch, and a provider given as `"module:Class"` is imported when it is chosen and not before.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module, metadata
from typing import Any

import pluggy

from rlhf_core.contract import hooks as hookspecs
from rlhf_core.contract.hooks import GROUP, KINDS, METRICS, OBSERVERS
from rlhf_core.contract.registry_view import BrokenPlugin, Plugin, PluginSelection, RegisteredProvider
from rlhf_core.errors import MissingPackage, NameConflict, PluginError, UnknownName, UsageError, run_option
from rlhf_core.plugins import import_paths as targets
from rlhf_core.plugins.hook_checks import check_marked, name_the_culprit, place_of, unknown_hook
from rlhf_core.plugins.known_packages import INSTALL
from rlhf_core.plugins.provider_checks import check_class
from rlhf_core.util.suggestions import did_you_mean, or_list

__all__ = [
    "BrokenPlugin",
    "Plugin",
    "RegisteredProvider",
    "Registry",
    "as_default",
    "conflict_text",
    "default_registry",
]

BUILTIN = {
    "core": "rlhf_core.plugin",
    "console": "rlhf_core.observer.console",
    "files": "rlhf_core.observer.files",
    "report": "rlhf_core.observer.report",
}
"""Plugins of core by name; the first cannot be blocked."""

FIRST_WORDS = ("command", "algorithm")
"""The kinds whose names are the first word of `rlhf-run`."""

LOCAL = "(local)"
"""The distribution of plugins and classes that come from no distribution."""


class Registry:
    """The plugins of this process.

    Args:
        autoload: load the entry points of installed distributions. Off, only the built-ins and `load` are there.
        blocked: plugin names that are not loaded.
        load: names of entry points or importable modules to load regardless of `autoload`.

    Raises:
        UsageError: `blocked` or `load` name something that does not exist, or a plugin of `load` failed to load.
        PluginError: a plugin failed to load, in strict mode only.
    """

    def __init__(self, autoload: bool = True, blocked: Collection[str] = (), load: Sequence[str] = ()) -> None:
        self.plugins: dict[str, Plugin] = {}
        """loaded objects, by plugin name"""
        self.broken_plugins: list[BrokenPlugin] = []
        self.blocked = frozenset(blocked)
        self._strict = os.environ.get("RLHF_STRICT_PLUGINS") == "1"
        self._tables: dict[str, dict[str, list[RegisteredProvider]]] = {kind: {} for kind in KINDS}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._manager.add_hookcall_monitoring(lambda *_: None, name_the_culprit)
        self.hook = self._manager.hook
        """the observer hooks: `registry.hook.rlhf_step_end(run=…, step=…, metrics=…)`"""

        self._entry_points = list(metadata.entry_points(group=GROUP))
        self._check_blocked()
        for name, module in BUILTIN.items():
            if name not in self.blocked:
                self.register(import_module(module), name, "rlhf-core", metadata.version("rlhf-core"))
        autoload = autoload and os.environ.get("RLHF_DISABLE_PLUGIN_AUTOLOAD") != "1"
        self.selection = PluginSelection(autoload, tuple(sorted(self.blocked)), tuple(load))
        """selection with which workers in other processes make theirs"""
        for entry_point in self._entry_points:
            if entry_point.name not in self.blocked and (autoload or entry_point.name in load):
                self._load(entry_point, entry_point.name in load)
        for name in load:
            if name not in {entry_point.name for entry_point in self._entry_points}:
                self._load_module(name)

    # ------------------------------------------------------------------------------------------------------------------
    # loading

    def register(self, plugin: object, name: str, distribution: str = LOCAL, version: str = "") -> None:
        """Add a plugin: a module or any object with `@hookimpl` functions.

        Raises:
            PluginError: it breaks the contract; the message states how. Nothing of it remains.
        """
        known = Plugin(name, distribution, version)
        if name in self.plugins:
            raise PluginError(f"{self.plugins[name]}, which was loaded first, already has this plugin name")
        check_marked(plugin)
        self._manager.register(plugin, name)
        try:
            self._manager.check_pending()
            provided = [each for kind in KINDS for each in self._ask(kind, known)]
            self._check_first_words(provided)
        except pluggy.PluginValidationError as error:
            self._manager.unregister(plugin)
            raise PluginError(unknown_hook(plugin) or str(error)) from error
        except BaseException:
            self._manager.unregister(plugin)
            raise
        for each in provided:
            self._tables[each.kind].setdefault(each.name, []).append(each)
        self.plugins[name] = known

    @contextmanager
    def with_observers(self, observers: Mapping[str, object]) -> Iterator[None]:
        """Call the observer hooks of these objects like those of plugins while the context is open.

        Args:
            observers: objects with observer hooks, by what a note on an exception calls them.
        """
        for name, observer in observers.items():
            check_marked(observer)
            self._manager.register(observer, name)
        try:
            self._manager.check_pending()
            yield
        finally:
            for observer in observers.values():
                self._manager.unregister(observer)

    def notify(self, hook: str, leader: bool, **arguments: Any) -> list[Any]:
        """Call an observer hook and return the answers that are not None; of plugins, the leader calls all, and other
        processes those with a global `all_ranks = True`."""
        if leader:
            return list(getattr(self._manager.hook, hook)(**arguments))
        plugins = [self._manager.get_plugin(name) for name in self.plugins]
        others = [plugin for plugin in plugins if not getattr(plugin, "all_ranks", False)]
        return list(self._manager.subset_hook_caller(hook, others)(**arguments))

    def _load(self, entry_point: metadata.EntryPoint, wanted: bool) -> None:
        """Load one entry point. A failure is recorded; it is raised if `-p` asks for the plugin, or in strict mode."""
        assert entry_point.dist is not None, "entry points of installed distributions know them"
        plugin = Plugin(entry_point.name, entry_point.dist.name, entry_point.dist.version)
        try:
            self.register(entry_point.load(), plugin.name, plugin.distribution, plugin.version)
        except (Exception, SystemExit) as error:  # whatever a stranger's module does at import
            self._fail(BrokenPlugin(plugin, error), wanted)

    def _load_module(self, name: str) -> None:
        """Load the module that `-p NAME` asks for."""
        targets.add_working_folder()
        targets.check_module_name(name)
        try:
            module = import_module(name)
            if not self._manager.is_registered(module):  # an installed plugin may be named by its module too
                self.register(module, name)
                if not self._manager.get_hookcallers(module):
                    targets.report_no_hook(module, name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                return self._fail(BrokenPlugin(Plugin(name, LOCAL, ""), error), wanted=True)
            known = [*self.plugins, *(entry_point.name for entry_point in self._entry_points)]
            raise UsageError(f"-p {name}: no plugin or module is called {name!r}{did_you_mean(name, known)}") from None
        except (Exception, SystemExit) as error:
            self._fail(BrokenPlugin(Plugin(name, LOCAL, ""), error), wanted=True)

    def _fail(self, broken: BrokenPlugin, wanted: bool) -> None:
        """Record a plugin that failed to load, or raise."""
        if self._strict:
            raise PluginError(str(broken)) from broken.error
        if wanted:
            raise UsageError(f"-p {broken.plugin.name}: {broken}; RLHF_STRICT_PLUGINS=1 shows the traceback")
        self.broken_plugins.append(broken)

    def _check_blocked(self) -> None:
        known = sorted({*BUILTIN, *(entry_point.name for entry_point in self._entry_points)})
        for name in self.blocked:
            if name == "core":
                raise UsageError("-p no:core: the plugin 'core' cannot be blocked")
            if name not in known:
                raise UsageError(f"-p no:{name}: no plugin is called {name!r}; plugins are {', '.join(known)}")

    def _check_first_words(self, provided: Sequence[RegisteredProvider]) -> None:
        """Refuse what would make `rlhf-run NAME` ambiguous: a name of core's commands, or one name for two things."""
        core = {each.name for each in self.entries("command") if each.plugin.name == "core"}
        named = {kind: {each.name for each in provided if each.kind == kind} for kind in FIRST_WORDS}
        for kind, names in named.items():
            if taken := sorted(names & core):
                raise PluginError(
                    f"rlhf_{kind}() gives {taken[0]!r}, but a plugin cannot replace this command of rlhf-core"
                )
        if both := sorted(named["command"] & named["algorithm"]):
            raise PluginError(f"rlhf_command() and rlhf_algorithm() both give {both[0]!r}; rename one")

    def _ask(self, kind: str, plugin: Plugin) -> Iterator[RegisteredProvider]:
        """Yield the plugin's providers of `kind`."""
        for implementation in getattr(self._manager.hook, f"rlhf_{kind}").get_hookimpls():
            if implementation.plugin_name != plugin.name:
                continue
            table, place = implementation.function(), place_of(implementation.function)
            if not isinstance(table, Mapping):
                raise PluginError(f"rlhf_{kind}() must return {{name: provider}}, not {type(table).__name__}{place}")
            for name, target in table.items():
                try:
                    targets.check_provided(kind, name, target)
                except PluginError as error:
                    raise PluginError(f"{error}{place}") from None
                yield RegisteredProvider(kind, name, target, plugin)

    # ------------------------------------------------------------------------------------------------------------------
    # looking up

    def table(self, kind: str) -> dict[str, RegisteredProvider]:
        """Every name of a kind, sorted; of a clash, what was loaded first."""
        return {name: entries[0] for name, entries in sorted(self._tables[kind].items())}

    def entries(self, kind: str) -> Iterator[RegisteredProvider]:
        """Yield every entry of a kind, those of a clash included."""
        for entries in self._tables[kind].values():
            yield from entries

    @property
    def conflicts(self) -> list[list[RegisteredProvider]]:
        """The entries of each name that more than one plugin provides; a command and an algorithm can clash too."""
        first = {name for kind in FIRST_WORDS for name in self._tables[kind]}
        words = [[each for kind in FIRST_WORDS for each in self._tables[kind].get(name, [])] for name in sorted(first)]
        others = [entries for kind in KINDS if kind not in FIRST_WORDS for entries in self._tables[kind].values()]
        return [entries for entries in [*words, *others] if len(entries) > 1]

    def is_command(self, word: str) -> bool:
        """Return True if `rlhf-run WORD` is a command.

        Raises:
            NameConflict: one plugin has a command and another one an algorithm of this name.
        """
        command, algorithm = (self._find(kind, word) for kind in FIRST_WORDS)
        if command and algorithm:
            raise NameConflict(conflict_text([*command, *algorithm]))
        return bool(command)

    def observers(self) -> list[tuple[Plugin, str]]:
        """The plugins with observer hooks, and their descriptions."""
        watching = {each.plugin_name for hook in OBSERVERS for each in getattr(self.hook, hook).get_hookimpls()}
        objects = {name: self._manager.get_plugin(name) for name in self.plugins if name in watching}
        return [(self.plugins[name], (plugin.__doc__ or "").strip()) for name, plugin in objects.items()]

    def metrics(self) -> list[tuple[Plugin, str, str]]:
        """Every metric that a plugin documents: who, its name, `"unit: meaning"`."""
        asked = getattr(self._manager.hook, METRICS).get_hookimpls()
        told = {each.plugin_name: each.function() for each in asked}
        return [
            (plugin, metric, said)
            for name, plugin in self.plugins.items()
            for metric, said in told.get(name, {}).items()
        ]

    def resolve(self, kind: str, name: str) -> type[Any]:
        """The provider class called `name`, or the class that `module:Class` names (working folder first).

        Raises:
            UnknownName, NameConflict, MissingPackage: no such name; two of them; its package or an import is absent.
            ContractError: what the plugin names is no frozen dataclass.
        """
        if ":" in name:
            targets.add_working_folder()
            return check_class(kind, name, targets.load_local(kind, name))
        entries = self._find(kind, name)
        if not entries:
            raise self._unknown(kind, name)
        if len(entries) > 1:
            raise NameConflict(conflict_text(entries))
        (entry,) = entries
        if not isinstance(entry.target, str):
            return check_class(kind, f"{name!r} of {entry.plugin}", entry.target)
        return check_class(kind, f"{name!r} of {entry.plugin}", self._load_target(entry, entry.target))

    def _find(self, kind: str, name: str) -> list[RegisteredProvider]:
        """Return who provides `NAME`, or `PLUGIN/NAME` of one plugin."""
        plugin, _, bare = name.rpartition("/")
        entries = self._tables[kind].get(bare, [])
        return [entry for entry in entries if not plugin or entry.plugin.name == plugin]

    def provenance(self, kind: str, name: str) -> Plugin:
        """The plugin that provides `name`; one called `(local)` for `module:Class`."""
        entries = self._find(kind, name)
        return entries[0].plugin if entries else Plugin(LOCAL, LOCAL, "")

    def name_of(self, kind: str, cls: type) -> str:
        """The name under which `cls` is registered (`PLUGIN/NAME` if others have that name), or its `module:Class`."""
        path = f"{cls.__module__}:{cls.__qualname__}"
        for entry in self.entries(kind):
            if entry.target in (cls, path):
                return entry.name if len(self._tables[kind][entry.name]) == 1 else f"{entry.plugin.name}/{entry.name}"
        return path

    def _load_target(self, entry: RegisteredProvider, target: str) -> Any:
        """Import a `"module:Class"` that a plugin registered."""
        who = f"{entry.kind} {entry.name!r} of {entry.plugin}"
        try:
            return targets.load(target)
        except ModuleNotFoundError as error:
            raise MissingPackage(f"{who} needs the module {error.name!r}, which is not installed") from error
        except Exception as error:
            error.add_note(f"while importing {target} for {who}")
            raise

    def _unknown(self, kind: str, name: str) -> UsageError:
        """Return the error for a name that does not exist: the reason, and the remedy."""
        installed = sorted(self._tables[kind])
        has = f"; installed: {', '.join(installed)}" if installed else f"; no {kind} is installed"
        distribution = INSTALL.get(kind, {}).get(name)
        if distribution is None:
            meant = did_you_mean(name, [*installed, *INSTALL.get(kind, {})])
            file = f"; to read a file, pass {run_option('data.path', name)}" if kind == "data" and "." in name else ""
            return UnknownName(f"no {kind} is called {name!r}{meant}{file}{has}{self._suspects(name, bool(meant))}")
        if broken := [each for each in self.broken_plugins if each.plugin.distribution == distribution]:
            return MissingPackage(f"{kind} {name!r} comes with {distribution}: {broken[0]}")
        plugins = [each.name for each in self._entry_points if each.dist is not None and each.dist.name == distribution]
        if plugins:
            return UnknownName(
                f"{kind} {name!r} comes with {distribution}, whose plugin {or_list(plugins)} is not loaded: "
                f"drop -p no:{plugins[0]}, or pass -p {plugins[0]} where autoloading is off{has}"
            )
        return MissingPackage(f"{kind} {name!r} comes with {distribution}: python3 -m pip install {distribution}{has}")

    def _suspects(self, name: str, spelled_nearly: bool) -> str:
        """Name the broken plugins that may provide `name`: those of its name, or all of them if nothing is near it."""
        named = [each for each in self.broken_plugins if name in f"{each.plugin.name} {each.plugin.distribution}"]
        if named:
            return f"; {named[0]}"
        if spelled_nearly or not self.broken_plugins:
            return ""
        names = ", ".join(each.plugin.name for each in self.broken_plugins)
        return f"; plugins that failed to load: {names} (see rlhf-run plugins)"


_CURRENT: list[Registry] = []
"""The registry of the command that runs in this process, if one does."""


@contextmanager
def as_default(registry: Registry) -> Iterator[None]:
    """Let `default_registry` return `registry` while the context is open: providers inside of others are found in it too."""
    _CURRENT.append(registry)
    try:
        yield
    finally:
        _CURRENT.pop()


def default_registry() -> Registry:
    """Return the registry of the running command, else that of everything installed."""
    return _CURRENT[-1] if _CURRENT else _full_registry()


@lru_cache(maxsize=1)
def _full_registry() -> Registry:
    """Return the registry of everything installed, made once."""
    return Registry()


def conflict_text(entries: Sequence[RegisteredProvider]) -> str:
    """Describe several entries of one name, and the ways to choose among them."""
    entries = sorted(entries, key=lambda each: (each.plugin.name != "core", each.plugin.name))
    plugins = " and ".join(f"{each.plugin} (plugin {each.plugin.name!r})" for each in entries)
    names = or_list([f"{each.plugin.name}/{each.name}" for each in entries])
    kind = " and ".join(dict.fromkeys(each.kind for each in entries))
    name, blocked = entries[0].name, entries[-1].plugin.name
    return f"{kind} {name!r} is provided by {plugins}; choose {names}, or block one with -p no:{blocked}"
