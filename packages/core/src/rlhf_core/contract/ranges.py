"""Range checks of options, with one-line errors."""

from __future__ import annotations

import math

from rlhf_core.errors import OptionError

__all__ = ["at_least", "at_most", "finite"]


def at_least(least: float, options: object, *names: str) -> None:
    """Check that the named fields are at least `least`. Raises OptionError."""
    for name in names:
        if not getattr(options, name) >= least:  # written so that nan fails
            raise OptionError(name, f"must be at least {least:g}, not {getattr(options, name)}")


def at_most(most: float, options: object, *names: str) -> None:
    """Check that the named fields are at most `most`. Raises OptionError."""
    for name in names:
        if not getattr(options, name) <= most:
            raise OptionError(name, f"must be at most {most:g}, not {getattr(options, name)}")


def finite(options: object, *names: str) -> None:
    """Check that the named fields are neither infinite nor nan. Raises OptionError."""
    for name in names:
        if not math.isfinite(getattr(options, name)):
            raise OptionError(name, f"must be a finite number, not {getattr(options, name)}")
