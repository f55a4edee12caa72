"""Range checks of options, with one-line errors."""

from __future__ import annotations

from rlhf_core.errors import UsageError

__all__ = ["at_least", "at_most"]


def at_least(least: float, options: object, *names: str) -> None:
    """Check that the named fields are at least `least`. Raises UsageError."""
    for name in names:
        if not getattr(options, name) >= least:  # written so that nan fails
            raise UsageError(f"{name} must be at least {least:g}, not {getattr(options, name)}")


def at_most(most: float, options: object, *names: str) -> None:
    """Check that the named fields are at most `most`. Raises UsageError."""
    for name in names:
        if not getattr(options, name) <= most:
            raise UsageError(f"{name} must be at most {most:g}, not {getattr(options, name)}")
