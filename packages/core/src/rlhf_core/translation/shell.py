"""Lines of a shell, as the one program that they call and its flags.

Understood are line ends after a backslash, comments, assignments of variables, and the launchers `ray job submit`, `deepspeed`,
`accelerate launch`, `torchrun` and `python`. Nothing is run, and no variable of this process is read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_core.errors import UsageError

__all__ = ["Call", "call_of", "join_words", "split_words"]

SUBMIT = ["ray", "job", "submit"]
LAUNCHERS = {"deepspeed", "torchrun", "accelerate", "python", "python3"}
COUNTS = ("num_processes", "nproc_per_node", "num_gpus")
"""Flags of launchers that number the processes of a machine."""

ESCAPES = str.maketrans({"\n": "\\n", "\t": "\\t", "'": "\\'", "\\": "\\\\"})

IDLE = {"wait", "cd", "mkdir", "export", "conda", "source", "ray", "sleep", "pip", "set", "echo", "module"}
"""Words that begin a line which prepares for the program and is not the program."""


@dataclass(frozen=True)
class Call:
    """A program and what it is given."""

    program: str
    """a module, the path of a script, or `trl dpo`"""
    flags: Mapping[str, list[str]]
    """values by flag, without dashes in front and with underscores"""
    processes: str = ""
    """processes of each machine: a number, or `gpu` for as many as there are devices; empty where no launcher is named"""
    port: str = ""
    """port at which processes meet"""
    prepare: tuple[str, ...] = field(default=())
    """additional lines of the script"""


def call_of(text: str) -> Call:
    """Return the program that shell lines call.

    Raises:
        UsageError: no line calls a program, several do, or a quote has no end.
    """
    variables: dict[str, str] = {}
    calls, prepare = [], []
    for words in _commands(text):
        while words and (assigned := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
            variables[assigned[1]] = _fill(assigned[2], variables)
            words = words[1:]
        words = [_fill(word, variables) for word in words]
        if words[:3] == SUBMIT and "--" in words:
            words = words[words.index("--") + 1 :]
        if not words:
            continue
        if words[0] in IDLE:
            prepare.append(" ".join(words))
            variables |= dict(each.split("=", 1) for each in words[1:] if re.match(r"[A-Za-z_]\w*=", each))
            continue
        calls.append(words)
    if len(calls) != 1:
        found = f"{len(calls)} programs: {', '.join(' '.join(each[:3]) for each in calls)}" if calls else "none"
        raise UsageError(f"give one command that trains, generates or scores; found {found}")
    return _read(calls[0], tuple(prepare))


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command."""
    text = re.sub(r"(^|[ \t])#[ \t].*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\[ \t]*\r?\n", " ", text)
    text = re.sub(r"\n[ \t]*(?=--[a-z])", " ", text)  # the backslash before it was forgotten
    for line in text.splitlines():
        line = re.sub(r"^\s*\$\s+", "", line)
        line = re.sub(r"\$'((?:[^'\\]|\\.)*)'", lambda found: shlex.quote(_escapes(found[1])), line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        try:
            for word in lexer:
                if re.fullmatch(r"[;&|]+", word):
                    yield words
                    words = []
                else:
                    words.append(word)
        except ValueError as error:
            raise UsageError(f"the command cannot be read: {str(error).lower()}; quote it as one word") from None
        yield words


def _escapes(text: str) -> str:
    """Return the text that `$'…'` stands for."""
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "t": "\t"}.get(found[1], found[1]), text)


def _fill(word: str, variables: Mapping[str, str]) -> str:
    """Return a word with the variables that are known in it."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda name: variables.get(name[1] or name[2], name[0]), word)


def _read(words: Sequence[str], prepare: tuple[str, ...]) -> Call:
    """Return the call of one command's words."""
    rest, processes, port, module = list(words), "", "", False
    while rest and rest[0] in LAUNCHERS:
        launcher = rest.pop(0)
        if launcher == "accelerate" and rest[:1] == ["launch"]:
            rest.pop(0)
        own, rest, module = _launcher_flags(rest)
        if launcher not in ("python", "python3"):
            processes, port = _processes(own), own.get("master_port", own.get("main_process_port", port))
    if not rest:
        raise UsageError(f"{' '.join(words)}: there is no program after the launcher; give the whole command")
    program, rest = rest[0], rest[1:]
    if not module and program == "trl" and rest:
        program, rest = f"trl {rest[0]}", rest[1:]
    return Call(program, split_words(rest), processes, port, prepare)


def _launcher_flags(words: Sequence[str]) -> tuple[dict[str, str], list[str], bool]:
    """Return a launcher's own flags, the words from the program on, and True if the program is a module."""
    own: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).lstrip("-").partition("=")
        if name in ("m", "module"):
            return own, rest, True
        if not equals and len(rest) > 1 and not rest[0].startswith("-") and not rest[0].endswith(".py"):
            value = rest.pop(0)
        own[name.replace("-", "_")] = value
    return own, rest, False


def _processes(own: Mapping[str, str]) -> str:
    """Return the number of processes that a launcher's flags ask for, or `gpu`."""
    for name in COUNTS:
        if own.get(name, "").isdigit():
            return own[name]
    devices = own.get("include", "").partition(":")[2]
    return str(len(devices.split(","))) if re.fullmatch(r"[\d,]+", devices) else "gpu"


def split_words(words: Sequence[str]) -> dict[str, list[str]]:
    """Return values by flag; `key=value` words of Hydra are flags too, and words before any flag have the key ``."""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        hydra = re.match(r"(\+{0,2}|~)([A-Za-z_][\w.@/]*\.[\w.@/]*)=", word)
        if re.match(r"--?[A-Za-z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            current = flags.setdefault(name.replace("-", "_"), [])
            current[:] = [value] if equals else []
        elif hydra:
            flags[hydra[2]] = [word[hydra.end() :]]
            current = None
        else:
            (flags.setdefault("", []) if current is None else current).append(word)
    return flags


def join_words(words: Sequence[str]) -> str:
    """Return words as a shell reads them; a variable and a redirection stay what they are."""
    return " ".join(map(_quote, words))


def _quote(word: str) -> str:
    """Return a word in the quotes that it needs."""
    if re.fullmatch(r"[\w./:@%+=,${}*-]+|>", word):
        return word
    return f"$'{word.translate(ESCAPES)}'" if "\n" in word else shlex.quote(word)
