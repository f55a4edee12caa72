"""Everything rlhf-core raises on purpose.

    RlhfError
    ├── UsageError (also ValueError)     a user's mistake: `rlhf-run` prints the message and exits with 2, no traceback
    │   ├── OptionError                  the value of an option is wrong; names it as the user wrote it
    │   ├── UnknownName                  no provider, role or option of that name; suggests similar names
    │   ├── NameConflict                 two distributions provide the chosen name
    │   ├── MissingPackage               an optional package is not installed; gives the pip command
    │   └── DataError                    bad data; names file and row
    ├── PluginError                      a plugin could not be loaded (only raised in strict mode)
    ├── ContractError (also TypeError)   a provider returned something the contract forbids; names it and its distribution
    ├── NotFinite                        a loss or gradient is nan or infinite; carries the samples, and becomes a RunStopped
    │   └── NotFiniteReward              (also ContractError) the same of a reward
    └── RunStopped                       a run ended before its last step on purpose (signal, safety net); carries the exit code
        └── WorkerLost                   a process of the run died or hung; a launcher may replace it

A message is one line that states what to do next. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_core.option_text import OptionNames, advice, option, place_options, render_options, run_option

__all__ = [
    "ContractError",
    "DataError",
    "MissingPackage",
    "NameConflict",
    "NotFinite",
    "NotFiniteReward",
    "OptionError",
    "PluginError",
    "RlhfError",
    "RunStopped",
    "UnknownName",
    "UsageError",
    "WorkerLost",
    "advice",
    "option",
    "options_under",
    "run_option",
    "spell_options",
    "text_of",
]


class RlhfError(Exception):
    """The root of every error that rlhf-core raises on purpose.

    A message may name options by `option` and `run_option`; `str` writes them as the run's user does.
    """

    option_names: OptionNames | None = None
    """the spelling of the run's user; dotted paths where it is absent"""

    def __str__(self) -> str:
        return render_options(text_of(self), self.option_names)


class UsageError(RlhfError, ValueError):
    """A user's mistake. The message states what to do; the process exits with 2."""


class OptionError(UsageError):
    """The value of an option is wrong.

        raise OptionError("url", f"{url}: expected an http address")

    Args:
        field: the option, relative to the provider: `url`, `encoding.template`; several are a sequence.
        message: the rest of the sentence that the option's name begins.
    """

    def __init__(self, field: str | Sequence[str], message: str = "") -> None:
        fields = [field] if isinstance(field, str) else field
        space = "" if message.startswith((":", ",")) else " "
        super().__init__(f"{' and '.join(map(option, fields))}{space}{message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), text_of(self))


def _rebuild(cls: type[OptionError], message: str) -> OptionError:
    """An unpickled OptionError."""
    error = cls.__new__(cls)
    error.args = (message,)
    return error


class UnknownName(UsageError):
    """No provider, role or option has this name."""


class NameConflict(UsageError):
    """Two distributions provide the chosen name."""


class MissingPackage(UsageError):
    """An optional package is not installed. The message carries the pip command."""


class DataError(UsageError):
    """Bad data. The message begins with `file:row:`."""


class PluginError(RlhfError):
    """A plugin failed to load. Raised only in strict mode; otherwise listed by `rlhf-run plugins`."""


class ContractError(RlhfError, TypeError):
    """A provider broke the contract of its kind. The message names the provider and its distribution."""


class NotFinite(RlhfError):
    """A loss or a gradient is nan or infinite.

    Args:
        message: which, of which role.
        samples: the rows it came from, as far as this rank knows, as plain values.
    """

    def __init__(self, message: str, samples: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.samples = samples

    def __reduce__(self) -> tuple[type[NotFinite], tuple[str, list[dict[str, Any]]]]:
        return type(self), (text_of(self), self.samples)


class NotFiniteReward(NotFinite, ContractError):
    """A reward is nan or infinite. The message names the provider, its distribution and the first such sample."""


class RunStopped(RlhfError):
    """A run ended on purpose before its last step.

    Args:
        message: one line for the user.
        exit_code: what the process exits with (130 after Ctrl-C, 143 after SIGTERM, 1 for a safety net).
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[RunStopped], tuple[str, int]]:
        return type(self), (text_of(self), self.exit_code)


class WorkerLost(RunStopped):
    """A process of the run, apart from the one of the loop, died or hung.

    Args:
        who: its name in the run: `role actor rank 1`.
        report: what happened to it, as the beginning of a sentence.
    """

    def __init__(self, who: str, report: str) -> None:
        super().__init__(f"{report}; continue from the last checkpoint with {run_option('resume', True)}")
        self.who, self.report = who, report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.who, self.report)


# ----------------------------------------------------------------------------------------------------------------------
# names of options in messages
# ----------------------------------------------------------------------------------------------------------------------


def text_of(error: BaseException) -> str:
    """The message of `error` with the marks of its options, for a message around it."""
    return str(error.args[0]) if isinstance(error, RlhfError) and error.args else Exception.__str__(error)


@contextmanager
def options_under(path: str) -> Iterator[None]:
    """Place the options that errors from inside name: under `path`, `parts[0]`; `/reward` begins at the run."""
    try:
        yield
    except RlhfError as error:
        error.args = (place_options(text_of(error), path), *error.args[1:])
        raise


@contextmanager
def spell_options(names: OptionNames) -> Iterator[None]:
    """Let errors from inside name options as the user of a run does; the innermost run decides."""
    try:
        yield
    except RlhfError as error:
        error.option_names = error.option_names or names
        raise
