"""The commands beside training: each a frozen dataclass whose fields are its options, like a provider.

Fields without a default are positional words, in their order; the others are flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.config.parsing import split_flags
from rlhf_core.config.schema import Option, flag, options_of
from rlhf_core.config.value_types import from_words, metavar
from rlhf_core.errors import UsageError
from rlhf_core.plugins.import_paths import load
from rlhf_core.util.suggestions import closest_names

if TYPE_CHECKING:
    from rlhf_core.plugins.registry import Registry

__all__ = ["COMMANDS", "JOBS", "command_options", "make_command", "wants_help"]

COMMANDS = {
    "plugins": "rlhf_core.cli.plugins:Plugins",
    "doctor": "rlhf_core.cli.doctor:Doctor",
    "new-plugin": "rlhf_core.cli.new_plugin:NewPlugin",
    "chat": "rlhf_core.cli.chat:Chat",
    "merge-lora": "rlhf_core.cli.merge_lora:MergeLora",
    "serve-reward": "rlhf_core.reward.serve:ServeReward",
    "sweep": "rlhf_core.cli.sweep:Sweep",
    "curves": "rlhf_core.cli.curves:Curves",
    "frontier": "rlhf_core.cli.frontier:Frontier",
}

JOBS = {
    "generate": "rlhf_core.cli.generate:Generate",
    "score": "rlhf_core.cli.score:Score",
    "eval": "rlhf_core.cli.evaluate:Evaluate",
}
"""Commands that use providers and roles, and so have their flags; see `cli.job`."""


def wants_help(words: Sequence[str]) -> bool:
    """Whether help is asked for."""
    return "-h" in words or "--help" in words


def command_options(name: str) -> tuple[list[Option], list[Option]]:
    """The positional words and the flags of a command."""
    options = list(options_of(load(COMMANDS[name])))
    return (
        [option for option in options if option.required],
        [option for option in options if not option.required],
    )


def make_command(name: str, words: Sequence[str]) -> Callable[[Registry], int]:
    """The command, ready to be called.

    Raises:
        UsageError: a word too many or too few, an unknown flag, a value that does not fit.
    """
    positional, optional = command_options(name)
    given, flags = split_flags(words)
    usage = " ".join([f"rlhf-run {name}", *(option.path.upper() for option in positional)])
    if len(given) < len(positional):
        missing = positional[len(given)]
        raise UsageError(f"{name} needs {missing.path.upper()}, {missing.doc}: {usage}")
    if len(given) > len(positional):
        raise UsageError(f"unexpected {given[len(positional)]!r}: {usage}")
    values: dict[str, Any] = {option.path: word for option, word in zip(positional, given, strict=True)}
    known = {option.path: option for option in optional}
    for path, value in flags.items():
        if path not in known:
            close = closest_names(path, known)
            hint = (
                f"did you mean {known[close[0]].described(flag(close[0]))}?" if close else f"see rlhf-run {name} --help"
            )
            raise UsageError(f"{name} has no flag {flag(path)}; {hint}")
        try:
            values[path] = from_words(known[path].annotation, value)
        except ValueError:
            got = f", not {' '.join(value)!r}" if value else " and got none"
            raise UsageError(f"{flag(path)} expects {metavar(known[path].annotation)}{got}") from None
    command: Callable[[Registry], int] = load(COMMANDS[name])(**values)
    return command
