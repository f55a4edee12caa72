"""Parse settings of a run from a TOML tree and from flags into values by dotted path.

Two passes. The first finds what decides which options there are: the algorithm and one name per kind, from flags, else
from the file, else the algorithm's usual ones. The second reads every value. Later wins: defaults, file, flags.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.length import check_length, replace_length
from rlhf_core.config.option_fields import flag, option_fields
from rlhf_core.config.python_values import COMBINING, describe, text_of_value
from rlhf_core.config.schema import Schema, make_schema, provider_fields
from rlhf_core.config.value_types import MASK, from_plain, from_words, given_by, is_secret, metavar
from rlhf_core.contract.hooks import CHOSEN, SEVERAL
from rlhf_core.errors import UsageError, spell_options
from rlhf_core.option_text import OptionNames
from rlhf_core.plugins.provider_checks import class_of
from rlhf_core.util.repeats import number_repeats
from rlhf_core.util.text_files import read_text

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = [
    "Settings",
    "from_flags",
    "named_by",
    "parse_tree",
    "put",
    "read",
    "single_word",
    "split_flags",
    "split_own",
    "use_of",
    "wants_dry_run",
    "with_spelling",
]

Settings = dict[str, Any]
"""Values by dotted path."""


def read(argv: Sequence[str], registry: Registry) -> tuple[Schema, Settings]:
    """The options there are and those that are set, without building anything: enough for `--help`."""
    words, flags = split_flags(argv)
    if len(words) > 1:
        raise UsageError(f"unexpected {words[1]!r}; write flags such as --steps 20 after the algorithm")
    file = flags.pop("config", None)
    tree = _read_file(single_word("--config", file)) if file is not None else {}
    where = single_word("--config", file) if file is not None else ""
    wanted = {kind: named_by(kind, flags[kind]) for kind in CHOSEN if kind in flags and kind != "algorithm"}
    flags = {
        path: words
        for path, words in flags.items()
        if path not in wanted and path not in ("help", "help_all", "dry_run")
    }
    if words:
        wanted["algorithm"] = words[0]
    uses = {path.removesuffix(".use"): single_word(flag(path), flags[path]) for path in flags if path.endswith(".use")}
    in_file = frozenset(kind for kind in CHOSEN if kind in tree)
    with spell_options(OptionNames(language="flags", flags=frozenset(wanted), file=where, in_file=in_file)):
        schema, settings = parse_tree(tree, registry, where=where, wanted=wanted, uses=uses)
    in_file |= frozenset(settings)
    set_by_flags = from_flags(flags, schema)
    given = frozenset(set_by_flags) | frozenset(wanted)
    with spell_options(OptionNames(language="flags", flags=given, file=where, in_file=in_file)):
        check_length(settings)
        check_length(set_by_flags)
    replace_length(settings, set_by_flags)
    _merge(settings, set_by_flags)
    return with_spelling(schema, "flags", flags=given, file=where, in_file=in_file - given), settings


def with_spelling(schema: Schema, language: str, **sources: Any) -> Schema:
    """The schema for a user who writes options in `language`; `sources` are further fields of OptionNames."""
    names = OptionNames(frozenset(schema.options), frozenset(filter(None, schema.names)), language, **sources)
    return dataclasses.replace(schema, option_names=names)


def split_flags(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words before the first flag, and each flag's path with the words after it; of a repeated flag the last."""
    before: list[str] = []
    flags: dict[str, list[str]] = {}
    current = before
    for word in words:
        if word == "-h":
            word = "--help"
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].partition("=")
            current = flags[name.replace("-", "_")] = [value] if equals else []
        else:
            current.append(word)
    return before, flags


def wants_dry_run(words: Sequence[str]) -> bool:
    """Return True if the words ask to check a run and not to start it.

    Raises:
        UsageError: a value that is neither True nor False.
    """
    given = split_flags(words)[1].get("dry_run")
    if given is None:
        return False
    try:
        return bool(from_words(bool, given))
    except ValueError:
        raise UsageError(f"--dry-run expects True or False, not {' '.join(given)!r}") from None


def split_own(own: Collection[str], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of flags that are called `own` or under such a name, `--help` included, and all other words."""
    parts: tuple[list[str], list[str]] = ([], [])
    part = parts[1]
    for word in words:
        if word.startswith("--") or word == "-h":
            head = word.lstrip("-").partition("=")[0].partition(".")[0].replace("-", "_")
            part = parts[0] if head in {*own, "help", "help_all", "h"} else parts[1]
        part.append(word)
    return parts


def named_by(kind: str, words: Sequence[str]) -> str:
    """The name that the flag of a kind has; several names, of a kind that may have them, with commas between."""
    if kind in COMBINING and len(words) > 1:
        combined = f"{flag(kind)} {COMBINING[kind]} {flag(f'{kind}.parts')} {' '.join(map(shlex.quote, words))}"
        raise UsageError(f"{flag(kind)} takes one value, not {' '.join(words)!r}; to combine several, pass {combined}")
    if kind not in SEVERAL or not words:
        return single_word(flag(kind), words)
    return ",".join(filter(None, re.split(r"[\s,]+", " ".join(words))))


def single_word(name: str, words: Sequence[str]) -> str:
    """The single word of a flag."""
    if len(words) != 1:
        got = f"not {' '.join(words)!r}" if words else "but got none"
        raise UsageError(f"{name} takes one value, {got}")
    return words[0]


def _read_file(path: str) -> dict[str, Any]:
    """The tree of a TOML file."""
    import tomllib

    try:
        return tomllib.loads(read_text(Path(path)))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:  # not text, no TOML, or a number of thousands of digits
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None


def parse_tree(
    tree: Mapping[str, Any],
    registry: Registry,
    *,
    instances: Mapping[str, Any] | None = None,
    where: str = "",
    wanted: Mapping[str, str] | None = None,
    uses: Mapping[str, str] | None = None,
) -> tuple[Schema, Settings]:
    """The options there are and those a tree sets.

    Args:
        tree: a TOML file's contents, or the same from Python.
        registry: where names are looked up.
        instances: ready-made providers by kind.
        where: the file, for error messages.
        wanted: names of providers by kind that replace the tree's own, options included.
        uses: names of providers inside roles' options by path, likewise.
    """
    instances, wanted, uses = instances or {}, wanted or {}, uses or {}
    tree = {kind: _in_one_table(kind, value, where) if kind in SEVERAL else value for kind, value in tree.items()}
    algorithm = wanted.get("algorithm") or _use("algorithm", tree, where)
    if not algorithm:
        installed = ", ".join(registry.table("algorithm")) or "none"
        raise UsageError(f"name an algorithm first: rlhf-run ALGORITHM …; installed: {installed}")
    cls = class_of("algorithm", algorithm, instances.get("algorithm"), registry)
    roles: Mapping[str, Any] = cls.roles
    kinds = [kind for kind in CHOSEN if kind in tree and kind not in roles]
    named = {kind: name for kind in kinds if (name := _use(kind, tree, where))}
    values, inside = _read_uses(tree, roles, registry, where, uses)
    schema = make_schema(algorithm, {**named, **wanted}, registry, instances, inside)
    for kind in kinds:
        kept = isinstance(tree[kind], Mapping) and schema.names[kind] == named.get(kind, schema.names[kind])
        values[kind] = {key: value for key, value in tree[kind].items() if key != "use"} if kept else {}
    return schema, dict(_values(values, schema, where))


def put(table: dict[str, Any], name: str, own: str, options: Mapping[str, Any]) -> None:
    """Put the options of a provider under its name, or if `own` numbers it, under its number there."""
    if own == name:
        table[name] = dict(options)
    else:
        table.setdefault(name, {})[own.removeprefix(f"{name}.")] = dict(options)


def _in_one_table(kind: str, value: Any, where: str) -> Any:
    """A list of providers of one kind, or of their names as `use`, as one table: names under `use`, options under names."""
    if isinstance(value, Mapping) and isinstance(value.get("use"), (list, tuple)):
        names = [use_of(each, f"{_location(where)}{kind}.use") for each in value["use"]]
        return {**value, "use": ",".join(names) or "none"}
    if not isinstance(value, (list, tuple)):
        return value
    names = [use_of(each, f"{_location(where)}{kind}") for each in value]
    if "" in names:
        raise UsageError(f"{_location(where)}{kind} {names.index('') + 1} of the list needs a name as `use`")
    options = [{key: held for key, held in _as_table(each).items() if key != "use"} for each in value]
    if len(names) == 1:
        return {"use": names[0], **options[0]}
    table: dict[str, Any] = {"use": ",".join(names) or "none"}
    for name, own, plain in zip(names, number_repeats(names), options, strict=True):
        if plain:
            put(table, name, own, plain)
    return table


def _use(kind: str, tree: Mapping[str, Any], where: str) -> str:
    """The name that a tree gives for a kind: `use` of its table, or the bare name; empty where it gives none."""
    value, path = tree.get(kind, ""), f"{_location(where)}{kind}"
    if kind in COMBINING and isinstance(value, (list, tuple)):
        raise UsageError(f'{path} is a list; to combine several, set use = "{COMBINING[kind]}" and parts = [...]')
    return use_of(value, path)


def use_of(table: Any, path: str) -> str:
    """`use` of a table, or the bare name."""
    name = table.get("use", "") if isinstance(table, Mapping) else table
    if not isinstance(name, str):
        raise UsageError(f"{path} must be a name, or a table with a name as `use`, not {describe(name)}")
    return name


def _read_uses(
    tree: Mapping[str, Any], roles: Mapping[str, Any], registry: Registry, where: str, wanted: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A tree with the providers inside its roles as tables of their options, and the name of each by path.

    A name in `wanted` replaces the tree's own, options included.
    """
    values, uses = dict(tree), {}
    for role, options in roles.items():
        given = _as_table(tree.get(role))
        for name, kind in provider_fields(type(options)):
            path, held = f"{role}.{name}", given.get(name, {})
            if dataclasses.is_dataclass(held) and not isinstance(held, type):
                held = {"use": registry.name_of(kind, type(held)), **_as_table(held)}
            use = use_of(held, f"{_location(where)}{path}")
            uses[path] = wanted.get(path, use)
            dropped = path in wanted and use != wanted[path]
            table = {} if dropped or isinstance(held, str) else {k: v for k, v in held.items() if k != "use"}
            if name in given:
                given = {**given, name: table}
        if role in tree and given:
            values[role] = given
    return values, {path: use for path, use in uses.items() if use}


def _as_table(value: Any) -> dict[str, Any]:
    """A table of options; of an instance, its fields. Empty where it is neither."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in option_fields(type(value))}
    return dict(value) if isinstance(value, Mapping) else {}


def _location(where: str) -> str:
    return f"{where}: " if where else ""


def _values(tree: Mapping[str, Any], schema: Schema, where: str, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every `(path, value)` of a tree, each read by its type."""
    for key, value in tree.items():
        path = f"{above}.{key}".lstrip(".")
        option = schema.options.get(path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {each.name: getattr(value, each.name) for each in option_fields(type(value))}
        if option is None or (isinstance(value, Mapping) and option.annotation is type(None)):
            if not schema.is_group(path):
                raise UsageError(f"{_location(where)}unknown option {path!r}{schema.hint(path, str)}")
            if not isinstance(value, Mapping):
                raise UsageError(f"{_location(where)}{path} must be a table of options, not {describe(value)}")
            yield from _values(value, schema, where, path)
            continue
        if is_secret(option.annotation) and value == MASK:
            raise UsageError(f"{_location(where)}{path} is hidden in this file; give it as {flag(path)} env:NAME")
        if any(isinstance(each, str) and "://" in each and MASK in each for each in [value, *_elements(value)]):
            raise UsageError(
                f"{_location(where)}{path} has a hidden part in this file; give the whole address as {flag(path)} "
                "ADDRESS"
            )
        if given := text_of_value(value):
            raise UsageError(
                f"{_location(where)}{path} was given from Python ({given}); run it from Python again, with "
                f"make_config(…, {path.partition('.')[0]}=…)"
            )
        try:
            yield path, from_plain(option.annotation, value)
        except ValueError:
            got = "" if is_secret(option.annotation) else f", not {describe(value)}"
            if where and given_by(option.annotation) == "python":
                raise UsageError(f"{_location(where)}{path} can only be set from Python; remove it") from None
            raise UsageError(f"{_location(where)}{path} must be {metavar(option.annotation)}{got}") from None


def _elements(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def from_flags(flags: Mapping[str, Sequence[str]], schema: Schema) -> Settings:
    """The settings of flags, each read by its type."""
    settings: Settings = {}
    for path, words in flags.items():
        option = schema.options.get(path)
        if option is None:
            raise UsageError(f"unknown flag {flag(path)}{schema.hint(path, flag)}")
        if option.elsewhere:
            raise UsageError(f"{flag(path)} is not a flag: set {path} {option.elsewhere}")
        try:
            settings[path] = from_words(option.annotation, words)
        except ValueError:
            got = f", not {' '.join(words)!r}" if words else ", but got none"
            got = "" if is_secret(option.annotation) else got
            raise UsageError(f"{flag(path)} expects {metavar(option.annotation)}{got}") from None
    return settings


def _merge(settings: Settings, later: Settings) -> None:
    """Put `later` over `settings`. An optional group set to None drops what was set inside it, and vice versa."""
    for path in later:
        for old in [old for old in settings if old.startswith(f"{path}.") or path.startswith(f"{old}.")]:
            del settings[old]
    settings |= later
