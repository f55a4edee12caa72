"""Checks that numeric options are inside their domain, when a provider is made and before anything is loaded."""

from __future__ import annotations

from rlhf_core.errors import UsageError

__all__ = ["check_ranges"]


def check_ranges(provider: object, **intervals: str) -> None:
    """Check each named option of `provider` against its interval in mathematical notation, for example `[0, 1)`.

    Raises:
        UsageError: a value is outside.
    """
    for name, interval in intervals.items():
        value, (low, high) = getattr(provider, name), map(float, interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):  # nan is neither
            raise UsageError(f"{name} must be in {interval}, not {value}")
