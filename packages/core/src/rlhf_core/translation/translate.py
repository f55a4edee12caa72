"""From an old command to the new one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.config.foreign_flags import FLAGS, read_answer
from rlhf_core.config.option_fields import flag
from rlhf_core.config.parsing import read
from rlhf_core.config.schema import Schema
from rlhf_core.config.value_types import to_plain
from rlhf_core.contract.hooks import CHOSEN
from rlhf_core.errors import UsageError
from rlhf_core.run.command import read_command
from rlhf_core.translation.draft import Dialect, Draft, Note, Program, is_true
from rlhf_core.translation.programs import find_program
from rlhf_core.translation.shell import Call, call_of, join_words

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["Translation", "translate"]


ONLINE_KINDS = {"rollout", "reward"}

BEFORE = ("model", "", "sampling", "data", "filter", "rollout", "reward", "algorithm", "advantage", "loss")
AFTER = ("strategy", "launcher", "evaluator", "observer")
"""Sections of a command in their order: the blank stands for options of the run, and roles are between the two."""


@dataclass(frozen=True)
class Translation:
    """A command of `rlhf-run` in the place of another one."""

    words: tuple[str, ...]
    """words of `rlhf-run`, or of a shell command if `program` is not `rlhf-run`"""
    notes: tuple[Note, ...]
    blanks: tuple[str, ...]
    """placeholders in capital letters for values that the old command does not have"""
    launcher: tuple[str, ...] = ()
    """launcher that starts several processes, in place of `rlhf-run`"""
    is_run: bool = True
    """True if the command trains, so that a file can describe it"""

    @property
    def program(self) -> tuple[str, ...]:
        """The words before those of `rlhf-run`."""
        return self.launcher or (() if self.words[0] == "cat" else ("rlhf-run",))

    def tree(self, registry: Registry) -> dict[str, Any]:
        """Return a run's options as the tables of a file.

        Raises:
            UsageError: the command cannot be read; the message states why.
        """
        schema, settings = read(self.words, registry)
        tree: dict[str, Any] = {"algorithm": {"use": self.words[0]}}
        for path, value in settings.items():
            if path in CHOSEN:
                continue
            table = tree
            *groups, last = path.split(".")
            for group in groups:
                table = table.setdefault(group, {})
            table[last] = to_plain(value)
        chosen = {word.removeprefix("--") for word in self.words if word.removeprefix("--") in CHOSEN}
        for kind in chosen:
            tree[kind] = {"use": schema.names[kind], **tree.get(kind, {})}
        return {**{name: value for name, value in tree.items() if not isinstance(value, dict)}, **tree}

    def problem(self, registry: Registry) -> str:
        """Return why the command cannot be read, or nothing if it can."""
        try:
            if registry.is_command(self.words[0]):
                read_command(self.words, registry)
            elif self.words[0] != "cat":
                read(self.words, registry)
        except UsageError as error:
            return str(error)
        return ""

    def text(self) -> str:
        """Return the command, one flag per line, and the notes as comments."""
        groups: list[list[str]] = [[*self.program]]
        for word in self.words:
            groups[-1:] = [groups[-1], [word]] if re.match("--[a-z]", word) else [[*groups[-1], word]]
        return "\n".join([" \\\n    ".join(map(join_words, groups)), *(f"# {line}" for line in self.remarks())])

    def remarks(self) -> Iterator[str]:
        """Yield what the new command lacks: values to fill in, and flags that have no place in it."""
        if self.blanks:
            yield f"fill in {', '.join(self.blanks)}"
        for text in dict.fromkeys(note.text for note in self.notes):
            yield f"{', '.join(_spelling(note.flag) for note in self.notes if note.text == text)}: {text}"


def _spelling(name: str) -> str:
    """Return the name of an old option as its users write it."""
    return f"--{name}" if re.fullmatch(r"[A-Za-z_]+\w*", name) else name


def translate(text: str, registry: Registry) -> Translation:
    """Translate a command.

    Args:
        text: shell lines with one program in them.
        registry: where options of providers are looked up.

    Raises:
        UsageError: no program is named, or none that is known.
    """
    call = call_of(text)
    program = find_program(call.program)
    draft = _begin(call, program)
    for rule in program.dialect.rules:
        rule(draft)
    for line in call.prepare:
        if line.startswith("ray "):
            draft.note(f"{line[:40]}", "--launcher ray starts Ray, or joins --launcher.address")
    if draft.command == "cat":
        return Translation(("cat", *draft.words), tuple(draft.notes), (), (), False)
    _place(draft, program.dialect, registry)
    blanks = list(_fill_blanks(draft, registry))
    if registry.is_command(draft.command):
        required = [option.path for option in _schema(draft, registry).options.values() if option.required]
        draft.words += [
            " ".join(draft.settings.pop(path)) for path in required if path in draft.settings and "." not in path
        ]
    words = [draft.command, *draft.words]
    for path, values in sorted(draft.settings.items(), key=_position):
        words += [flag(path), *values]
    trains = not registry.is_command(draft.command)
    launcher = tuple(_launcher(call, draft)) if trains else ()
    return Translation(tuple(words), tuple(draft.notes), tuple(blanks), launcher, trains)


def _position(setting: tuple[str, list[str]]) -> int:
    """Return the sort key of a setting in the new command: model and data first, then options, then places."""
    head, _, rest = setting[0].partition(".")
    head = head if rest or head in BEFORE + AFTER else ""
    order = [*BEFORE, "roles", *AFTER]
    return order.index(head if head in order else "roles")


def _launcher(call: Call, draft: Draft) -> Iterator[str]:
    """Yield the words that start several processes."""
    if call.processes not in ("", "1") and "launcher" not in draft.settings:
        yield from ("torchrun", "--nproc-per-node", call.processes)
        if call.port:
            yield from ("--master-port", call.port)
        yield from ("-m", "rlhf_core")


def _begin(call: Call, program: Program) -> Draft:
    """Return the draft with all flags in their usual names, the program's own defaults among them."""
    flags: dict[str, list[str]] = {}
    for name, words in call.flags.items():
        if name:
            flags[_usual_name(name, program.dialect)] = list(words)
    loose = [word for word in call.flags.get("", ()) if set(word) != {"."}]  # dots stand for flags that are left out
    notes = [Note(word, "this word does not belong to a flag") for word in loose]
    usual = dict(_pairs(program.usual))
    left = {name: words for name, words in usual.items() if name not in flags}
    draft = Draft(program.command, {**left, **flags}, call.processes, notes=notes, usual=frozenset(left))
    for word in program.always.split(" --"):
        kind, _, name = word.removeprefix("--").partition(" ")
        if kind:
            draft.set(kind, name)
    return draft


def _pairs(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield flag and words of `name value, name value`."""
    for part in filter(None, text.split(", ")):
        name, *words = part.split()
        yield name, words


def _usual_name(name: str, dialect: Dialect) -> str:
    """Return the name of an option that the tables have."""
    if name in dialect.names:
        return dialect.names[name]
    tail = name.partition(".")[2]
    if dialect.groups and tail:
        return dialect.names.get(tail, tail.replace(".", "_"))
    return name


def _place(draft: Draft, dialect: Dialect, registry: Registry) -> None:
    """Give each flag that is left its answer, and expand options of roles."""
    schema = _schema(draft, registry)
    for path in [path for path in draft.settings if "{role}" in path]:
        values = draft.settings.pop(path)
        for each in _of_roles(path, schema, draft):
            draft.settings.setdefault(each, values)
    for name, words in list(draft.flags.items()):
        if name in dialect.absent or _ending(name, dialect.absent):
            if is_true(words):
                draft.note(name, dialect.absent.get(name) or _ending(name, dialect.absent))
            continue
        answers = [dialect.answers[name]] if name in dialect.answers else FLAGS.get(name, ())
        if name in schema.options and not answers:
            answers = (flag(name),)
        if not any(_answer(draft, words, answer, registry) for answer in answers) and is_true(words):
            known = "this run has no such option" if answers else "this flag is unknown"
            draft.note(name, f"{known}; `rlhf-run {draft.command} --help` lists the options")


def _ending(name: str, table: Mapping[str, str]) -> str:
    """Return the entry of a table by the end of a dotted name."""
    parts = name.split(".")
    return next((table[end] for k in range(1, len(parts)) if (end := ".".join(parts[k:])) in table), "")


def _schema(draft: Draft, registry: Registry, more: Mapping[str, str] | None = None) -> Schema:
    """Return the options that there are, with providers of `more` where the draft chooses none."""
    kinds = {**(more or {}), **draft.kinds}
    words = [word for kind, name in kinds.items() for word in (f"--{kind}", name)]
    uses = [word for path, values in draft.settings.items() if path.endswith(".use") for word in (flag(path), *values)]
    words = [draft.command, *words, *uses]
    key = tuple(words)
    if key not in draft.schemas:
        is_command = registry.is_command(draft.command)
        draft.schemas[key] = (read_command([*words, "--help"], registry) if is_command else read(words, registry))[0]
    return draft.schemas[key]


def _of_roles(path: str, schema: Schema, draft: Draft) -> list[str]:
    """Return the paths of every role that has an option."""
    if "{role}" not in path:
        return [path]
    known = re.compile(re.escape(path).replace(re.escape("{role}"), r"[a-z_]+"))
    found = [each for each in schema.options if known.fullmatch(each)]
    return [each for each in found if each.partition(".")[0] not in draft.unused_roles]


def _answer(draft: Draft, words: list[str], answer: str, registry: Registry) -> bool:
    """Write the options of an answer; return False if the run has them not."""
    pairs, _ = read_answer(answer)
    chosen = {path: value for path, value in pairs if path in CHOSEN and value}
    if any(kind not in _schema(draft, registry).names for kind in chosen):
        return False
    schema, kinds = _schema(draft, registry, chosen), chosen
    paths = [(each, value) for path, value in pairs if path not in chosen for each in _of_roles(path, schema, draft)]
    if not (paths or kinds) or any(path not in schema.options for path, _ in paths):
        return False
    if any(path not in chosen and not _of_roles(path, schema, draft) for path, _ in pairs):
        return False
    if not is_true(words) and all(value for _, value in paths):
        return True  # a switch that is off
    for kind, name in kinds.items():
        draft.settings.setdefault(kind, [name])
    for path, value in paths:
        draft.settings.setdefault(path, value.split() if value else _values(words, schema.options[path].annotation))
    return True


def _values(words: list[str], annotation: Any) -> list[str]:
    """Return the words of a value as ours are written: a switch is True, and a list has blanks in the place of commas."""
    if not words:
        return ["True"]
    text = " ".join(words)
    if "tuple" in str(annotation) or "Sequence" in str(annotation):
        return re.sub(r"[\[\]'\",]", " ", text).split() or words
    if text.lower() in ("true", "false"):
        return [text.capitalize()]
    if text.startswith("["):
        return [",".join(re.findall(r"[^\[\]'\", ]+", text))]
    return [text]


def _fill_blanks(draft: Draft, registry: Registry) -> Iterator[str]:
    """Set required options that the old command lacks, and yield their placeholders."""
    schema = _schema(draft, registry)
    samples = schema.names.keys() >= ONLINE_KINDS and not registry.is_command(draft.command)
    if samples and "reward" not in draft.settings:
        draft.set("reward", "model")
        schema = _schema(draft, registry)
    if "model" in schema.options and not schema.options["model"].required and "model" not in draft.settings:
        draft.set("model", "MODEL")
        yield "MODEL"
    positional = [option.path for option in schema.options.values() if option.required and "." not in option.path]
    for option in schema.options.values():
        if not option.required or option.path in draft.settings or option.path in positional[: len(draft.words)]:
            continue
        word = option.path.upper().replace(".", "_").replace("DATA_PATH", "DATA")
        draft.set(option.path, word)
        yield word
