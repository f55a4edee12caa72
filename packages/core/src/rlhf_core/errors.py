"""Everything rlhf-core raises on purpose.

    RlhfError
    ├── UsageError (also ValueError)     a user's mistake: `rlhf-run` prints the message and exits with 2, no traceback
    │   ├── UnknownName                  no provider, role or option of that name; says what is near
    │   ├── NameConflict                 two distributions provide the chosen name
    │   ├── MissingPackage               something optional is not installed; says the pip command
    │   └── DataError                    bad data; names file and row
    ├── PluginError                      a plugin could not be loaded (only raised in strict mode)
    ├── ContractError (also TypeError)   a provider returned something the contract forbids; names it and its distribution
    ├── NotFinite                        a loss or gradient is nan or infinite; carries the samples, and becomes a RunStopped
    │   └── NotFiniteReward              (also ContractError) the same of a reward
    └── RunStopped                       a run ended before its last step on purpose (signal, safety net); carries the exit code

A message is one line that says what to do next. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ContractError",
    "DataError",
    "MissingPackage",
    "NameConflict",
    "NotFinite",
    "NotFiniteReward",
    "PluginError",
    "RlhfError",
    "RunStopped",
    "UnknownName",
    "UsageError",
]


class RlhfError(Exception):
    """The root of every error that rlhf-core raises on purpose."""


class UsageError(RlhfError, ValueError):
    """A user's mistake. The message says what to do; the process exits with 2."""


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
        return type(self), (str(self), self.samples)


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
        return type(self), (str(self), self.exit_code)
