"""A new command on its way: flags of the old one that are left, settings of the new one, and notes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_core.config.schema import Schema
from rlhf_core.contract.hooks import CHOSEN
from rlhf_core.errors import UsageError

__all__ = ["Dialect", "Draft", "Note", "Program", "Rule", "is_true"]


@dataclass(frozen=True)
class Note:
    """Note on a flag without translation, and the reason."""

    flag: str
    text: str


@dataclass
class Draft:
    """An old command of which some flags are translated."""

    command: str
    """algorithm or command of `rlhf-run`"""
    flags: dict[str, list[str]]
    """the flags that are left, in the dialect's usual names"""
    processes: str = ""
    words: list[str] = field(default_factory=list)
    """positional words after the command"""
    settings: dict[str, list[str]] = field(default_factory=dict)
    """values by option path, and names of providers by kind"""
    notes: list[Note] = field(default_factory=list)
    unused_roles: frozenset[str] = frozenset()
    """roles of the algorithm that this run does not have"""
    usual: frozenset[str] = frozenset()
    """flags that the old command leaves at the old program's default"""

    def has(self, name: str) -> bool:
        """Return True if a flag is given and not no, none or empty."""
        return name in self.flags and is_true(self.flags[name])

    def take(self, name: str, default: str = "") -> str:
        """Remove a flag and return its value as one word."""
        return " ".join(self.flags.pop(name)) if name in self.flags else default

    def take_switch(self, name: str) -> bool:
        """Remove a flag and return True if it is on."""
        return is_true(self.flags.pop(name)) if name in self.flags else False

    def take_number(self, name: str, default: float) -> float:
        """Remove a flag and return its number.

        Raises:
            UsageError: it is no number.
        """
        word = self.take(name)
        try:
            return float(word) if word else default
        except ValueError:
            raise UsageError(f"--{name} {word}: this is not a number; fill in its value first") from None

    def set(self, path: str, *words: object) -> None:
        """Give an option its value, or a kind its provider."""
        self.settings[path] = [_text(word) for word in words]

    def note(self, flag: str, text: str) -> None:
        """Name a flag that has no place in the new command."""
        if flag not in self.usual:
            self.notes.append(Note(flag, text))

    schemas: dict[tuple[str, ...], Schema] = field(default_factory=dict)
    """options that there are, by the command and its providers"""

    @property
    def kinds(self) -> dict[str, str]:
        """The chosen providers by kind."""
        return {path: words[0] for path, words in self.settings.items() if path in CHOSEN}


Rule = Callable[[Draft], None]
"""Translates flags that decide together, and removes them from the draft."""


@dataclass(frozen=True)
class Dialect:
    """Option syntax of one project's programs."""

    title: str
    rules: tuple[Rule, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    """the usual name of an option, by another name of it"""
    answers: Mapping[str, str] = field(default_factory=dict)
    """answers to write, by option, where they differ from `config.foreign_flags` or are missing there"""
    absent: Mapping[str, str] = field(default_factory=dict)
    """reasons why an option has no place here"""
    groups: bool = False
    """options may be written with a group, as `--rollout.temperature`"""


@dataclass(frozen=True)
class Program:
    """A program whose command lines are translated."""

    command: str
    """algorithm or command of `rlhf-run` where no rule decides"""
    dialect: Dialect
    always: str = ""
    """words that the new command has in any case, such as `--data hf`"""
    usual: str = ""
    """the program's own defaults that differ from ours, as flags of it"""


def is_true(words: Sequence[str]) -> bool:
    """Return True if a flag's words are no denial; a switch has none."""
    return list(words) not in [["False"], ["false"], ["None"], ["none"], ["null"], ["no"], ["0"], ["0.0"]]


def _text(value: object) -> str:
    """Return a value as a word of a flag: whole numbers without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)
