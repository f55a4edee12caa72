"""Base class of providers of every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.capability import replaceable

if TYPE_CHECKING:
    from rlhf_core.contract.engines import Closeable, OpenContext

__all__ = ["Provider"]


@replaceable
class Provider:
    """Base class of providers of all kinds.

    A provider that holds nothing is its own engine. One that holds something, or remembers something from step to step,
    returns another object from `open`: see `rlhf_core.contract.engines`.
    """

    @property
    def writes(self) -> tuple[str, ...]:
        """Files in the run's folder that it writes; folders end in `/`. One that another wrote is refused before step 1."""
        return ()

    def open(self, context: OpenContext) -> Closeable:
        """Return the engine that a run calls in this provider's place. Called once per run, after `check`.

        Observers, algorithms, strategies and launchers are not opened: calling one makes what is open.
        """
        return self

    def close(self) -> None:
        """Do nothing: a provider that is its own engine holds nothing."""

    def check(self) -> None:
        """Raise `UsageError` for what is missing (a package, a key, a file). Called once, before anything heavy starts."""
