"""From the words of a command line to a command and its context: one way for core's commands and those of plugins.

The words are read as those of a run are: fields of the command are options, and a command that uses providers and roles has
their flags too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_origin

from rlhf_core.config.builder import construct, parse, split_sections
from rlhf_core.config.option_fields import flag, option_fields
from rlhf_core.config.parsing import (
    Settings,
    from_flags,
    named_by,
    split_flags,
    split_own,
    wants_dry_run,
    with_spelling,
)
from rlhf_core.config.schema import Schema, Section, build_schema, provider_sections
from rlhf_core.contract.commands import Command
from rlhf_core.contract.hooks import CHOSEN
from rlhf_core.contract.options import RunConfig
from rlhf_core.errors import ContractError, RlhfError, RunStopped, UsageError, options_under, spell_options
from rlhf_core.option_text import OptionNames
from rlhf_core.plugins.attribution import note_provider
from rlhf_core.run.exporting import with_exported_models
from rlhf_core.run.failures import is_full
from rlhf_core.run.no_training import NoTraining, open_untrained

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.run.run import Run

__all__ = ["CommandRun", "context_of", "read_command", "run_command"]


@dataclass(frozen=True)
class CommandRun:
    """A command with the plugins and the run that its flags describe; a `CommandContext`."""

    registry: Registry
    command: Command
    names: Mapping[str, str] = field(default_factory=dict)
    """the chosen provider of each kind"""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """roles' options and providers, as a RunConfig holds them"""
    option_names: OptionNames = OptionNames()
    """spelling of options for the user, in messages"""
    run: RunConfig | None = None
    """the run whose flags the command was given, where it reads one"""

    @property
    def config(self) -> RunConfig:
        if self.run is not None:
            return self.run
        own = {each.name for each in option_fields(type(self.command))}
        shared = {each.name for each in dataclasses.fields(RunConfig)} & own
        values = {name: getattr(self.command, name) for name in shared}
        values |= {
            "names": self.names,
            "roles": {},
            "providers": {},
            **self.sections,
            "option_names": self.option_names,
        }
        return RunConfig(NoTraining(), **values)

    def open_run(self, config: RunConfig | None = None) -> AbstractContextManager[Run]:
        return _open(self.config if config is None else config, self.registry)


@contextmanager
def _open(config: RunConfig, registry: Registry) -> Iterator[Run]:
    """Open a run that trains nothing; models that it names may be checkpoints."""
    with with_exported_models(config, registry) as resolved, open_untrained(resolved, registry) as run:
        yield run


def read_command(words: Sequence[str], registry: Registry) -> tuple[Schema, Settings]:
    """Return the options of the command `words[0]` and those that are set, without building anything.

    Raises:
        UsageError: a word too many or too few, an unknown flag, a value that does not fit.
    """
    name = words[0]
    cls: type[Command] = registry.resolve("command", name)
    own = {each.name for each in option_fields(cls)}
    given, flags = split_flags(_run_words(cls, words[1:])[0])
    kinds = [kind for kind in CHOSEN if kind in flags and kind not in own]
    chosen = {kind: named_by(kind, flags.pop(kind)) for kind in kinds}
    asked_help = bool({"help", "help_all"} & flags.keys())
    flags = {path: words for path, words in flags.items() if path not in ("help", "help_all")}
    if "dry_run" not in own:
        flags.pop("dry_run", None)
    schema = _schema(name, cls, chosen, registry)
    positional = [option for option in schema.sections[0].options if option.required]
    several = bool(positional) and get_origin(positional[-1].annotation) is tuple  # takes all words that are left
    usage = " ".join([f"rlhf-run {name}", *(option.path.upper() for option in positional)]) + (" …" if several else "")
    if len(given) > len(positional) and not several:
        raise UsageError(f"unexpected {given[len(positional)]!r}: {usage}")
    settings: Settings = {option.path: word for option, word in zip(positional, given)} | from_flags(flags, schema)
    if several and len(given) >= len(positional):
        settings[positional[-1].path] = tuple(given[len(positional) - 1 :])
    if not asked_help:
        for option in positional:
            if option.path not in settings:
                raise UsageError(f"{name} needs {option.path.upper()}, {option.doc}: {usage}")
        for kind, usual in cls.defaults.items():
            if usual is not None and not schema.names[kind]:
                raise UsageError(f"{name} needs {flag(kind)} NAME; see rlhf-run plugins --kind {kind}")
    return with_spelling(schema, "flags", flags=frozenset(settings)), settings


def run_command(words: Sequence[str], registry: Registry) -> int:
    """Read, build and call a command; return its exit code. `--dry-run` checks it, and calls only one that has that option."""
    schema, settings = read_command(words, registry)
    cls: type[Command] = registry.resolve("command", words[0])
    run = parse(_run_words(cls, words[1:])[1], registry) if cls.reads_run else None
    made = construct(schema, settings)
    names = {kind: name for kind, name in schema.names.items() if name and kind != "command"}
    command: Command = made[""]
    sections, spelling = split_sections(schema, made), schema.option_names
    context = CommandRun(registry, command, {"algorithm": words[0], **names}, sections, spelling, run)
    try:
        with spell_options(spelling if run is None else run.option_names):
            with options_under("/"):
                command.check()
            if wants_dry_run(words) and "dry_run" not in settings:
                _check_providers(context)
                print(f"nothing is missing; {words[0]} can start")
                return 0
            code: Any = command(context)
    except Exception as error:
        if not isinstance(error, RlhfError) and is_full(error):
            where = f" for {error.filename}" if isinstance(error, OSError) and error.filename else ""
            raise RunStopped(f"no space is left{where}; free some space, then run {words[0]} again") from error
        note_provider(error, registry, context.config if command.defaults else None)
        raise
    if not isinstance(code, int):
        owner = registry.provenance("command", words[0])
        raise ContractError(f"command {words[0]!r} of {owner} must return an exit code, not {code!r}")
    return code


def _check_providers(context: CommandRun) -> None:
    """Let the chosen providers report what they miss."""
    if context.command.defaults:
        for path, provider in context.config.provider_paths():
            with options_under(path):
                provider.check()


def _run_words(cls: type[Command], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of a command's own flags, and those of the run that it reads; the first alone where it reads none."""
    if not cls.reads_run:
        return list(words), []
    return split_own({each.name for each in option_fields(cls)}, words)


def context_of(command: Command, registry: Registry) -> CommandRun:
    """Return the context of a command that is given from Python, with its usual providers.

    Raises:
        UsageError: the command needs a provider that has no usual name.
    """
    schema = _schema("command", type(command), {}, registry)
    if missing := [kind for kind, usual in command.defaults.items() if usual == ""]:
        raise UsageError(f"{type(command).__qualname__} needs a {missing[0]}; pass a context that has one")
    made = construct(dataclasses.replace(schema, sections=schema.sections[1:]), {})
    return CommandRun(registry, command, dict(schema.names), split_sections(schema, {"": command, **made}))


def _schema(name: str, cls: type[Command], chosen: Mapping[str, str], registry: Registry) -> Schema:
    """The options of a command with the providers `chosen` by kind, its usual ones elsewhere."""
    for kind in chosen:
        if kind not in cls.defaults:
            uses = f"it uses {', '.join(cls.defaults)}" if cls.defaults else f"see rlhf-run {name} --help"
            raise UsageError(f"{name} has no {kind}; {uses}")
    kinds = {kind: chosen.get(kind) or usual or "" for kind, usual in cls.defaults.items()}
    sections = [Section("", name, cls)]
    sections += [Section(role, f"role {role!r} (frozen)", type(base), base) for role, base in cls.roles.items()]
    return build_schema({"command": name, **kinds}, [*sections, *provider_sections(kinds, registry)])
