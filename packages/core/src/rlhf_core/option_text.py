"""Names of options inside messages, written the way the user of a run writes them.

A provider knows its fields, and not how its user set them: as a flag, in a file, or as an argument in Python. A message
therefore holds a mark in place of each name, and code that knows the user replaces it:

    raise OptionError("url", f"{url}: expected an http address")   # in the provider Remote
    --reward.url ftp://x: expected an http address                 # from the command line
    reward.url in run.toml ftp://x: expected an http address       # from a file
    Remote(url=…) ftp://x: expected an http address                # from Python

Marks are text: they survive f-strings, other exceptions, pickles and processes. A field is relative to its provider until
the message passes `options_under`, which core opens wherever it calls one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["OptionNames", "advice", "option", "place_options", "render_options", "run_option"]

OPEN, VALUE, CLOSE, IF, ELSE, END = (chr(0xE000 + number) for number in range(6))
"""Characters of the private use area of Unicode, which no tokenizer's or user's text has a meaning for."""
MARK = re.compile(f"{OPEN}(/?)([^{VALUE}{CLOSE}]*)(?:{VALUE}([^{CLOSE}]*))?{CLOSE}")
ADVICE = re.compile(f"{IF}([^{ELSE}]*){ELSE}([^{END}]*){END}")


def option(field: str, value: object = None) -> str:
    """The name of a provider's own option, for a message: `option("encoding.template")`.

    Args:
        field: the field, relative to the provider (or to the options object) that raises.
        value: the value to recommend: `option("too_long", "truncate")`.
    """
    worth = "" if value is None else f"{VALUE}{value}"
    return f"{OPEN}{field.replace('-', '_')}{worth}{CLOSE}"


def run_option(path: str, value: object = None) -> str:
    """The name of an option of the run, for a message: `run_option("batch_size")`, `run_option("sampling.n", 2)`.

    Args:
        path: an option of RunConfig, a kind of provider, or an option of another one: `data.chosen_key`.
        value: the value to recommend.
    """
    return option(f"/{path}", value)


def advice(text: str, otherwise: str = "") -> str:
    """`text` where the run has every option that it names, else `otherwise`."""
    return f"{IF}{text}{ELSE}{otherwise}{END}"


def place_options(message: str, path: str) -> str:
    """`message` with its relative fields under `path`; a path that begins with a slash starts at the run."""

    def place(mark: re.Match[str]) -> str:
        root, field, value = mark.groups()
        separator = "" if not path or path.endswith("/") else "."
        return option(f"/{field}" if root else f"{path}{separator}{field}", value)

    return MARK.sub(place, message)


def render_options(message: str, names: OptionNames | None = None) -> str:
    """`message` for a reader: its marks replaced by what `names` calls the options."""
    names = names or OptionNames()

    def choose(condition: re.Match[str]) -> str:
        text, otherwise = condition.groups()
        return text if all(names.has(mark[1], mark[2]) for mark in MARK.finditer(text)) else otherwise

    return MARK.sub(lambda mark: names.spell(mark[1], mark[2], mark[3]), ADVICE.sub(choose, message))


@dataclass(frozen=True)
class OptionNames:
    """Spelling of options for the user of one run. Without arguments: dotted paths."""

    options: frozenset[str] = frozenset()
    """the dotted path of every option that the run has; empty where they are unknown"""
    kinds: frozenset[str] = frozenset()
    """the kinds of providers that the run has"""
    language: str = ""
    """`flags` of a command line, `python`, or empty for dotted paths"""
    flags: frozenset[str] = frozenset()
    """paths that are set by flags"""
    file: str = ""
    """the file of options, if there is one"""
    in_file: frozenset[str] = frozenset()
    """paths that are set in the file"""
    classes: Mapping[str, str] = field(default_factory=dict)
    """the class by the path of each options object that a Python user made"""

    def render(self, message: str) -> str:
        """`message` with its options as the user writes them."""
        return render_options(message, self)

    def has(self, root: str, path: str) -> bool:
        """Return True if the run has this option, or if its options are unknown."""
        known = self.options | self.kinds
        return not known or (path if root else self._find(root, path)) in known

    def spell(self, root: str, path: str, value: str | None = None) -> str:
        """The name of an option, as its user writes it."""
        path = self._find(root, path)
        if self._is_in_file(path):
            return f"{path}{_assignment(value)} in {self.file}"
        if "[" in path or not self.language:
            return f"{path}{_assignment(value)}"
        if self.language == "flags":
            return f"--{path.replace('_', '-')}{'' if value in (None, 'True') else f' {value}'}"
        return self._python(path, value)

    def _find(self, root: str, path: str) -> str:
        """The path from the run. An error inside another provider gets the only option with this ending."""
        field = path.partition(".")[2] if root else path
        if not field or path in self.options:
            return path
        owned = [known for known in self.options if known.partition(".")[2] == field]
        return owned[0] if len(owned) == 1 else path

    def _is_in_file(self, path: str) -> bool:
        """An option that is set nowhere belongs where the others of its table are."""
        if path in self.flags or not self.file:
            return False
        head = path.partition(".")[0]
        near = {each.partition(".")[0] for each in self.in_file}
        return path in self.in_file or ("." in path and head in near - {each.partition(".")[0] for each in self.flags})

    def _python(self, path: str, value: str | None) -> str:
        """`batch_size=…`, `Json(encoding=Encoding(template=…))`, or the path where the user made no object."""
        *above, last = path.split(".")
        owners = [self.classes.get(".".join(above[: count + 1])) for count in range(len(above))]
        if None in owners:
            return f"{path}{_assignment(value)}"
        text = f"{last}={'…' if value is None else value if value in ('True', 'False') else _literal(value)}"
        for depth in reversed(range(len(above))):
            text = f"{owners[depth]}({text})" if not depth else f"{above[depth]}={owners[depth]}({text})"
        return text


def _assignment(value: str | None) -> str:
    return "" if value is None else f" = {_literal(value)}"


def _literal(value: str) -> str:
    """A word of a command line as a file has it."""
    if value in ("True", "False"):
        return value.lower()
    return value if re.fullmatch(r"-?[\d.]+(e-?\d+)?|[A-Z ]+", value) else json.dumps(value)
