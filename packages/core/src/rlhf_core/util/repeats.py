"""Names of which some come several times."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["number_repeats"]


def number_repeats(names: Sequence[str]) -> list[str]:
    """Return the names, those that come several times with their number: `a`, `b.1`, `b.2`."""
    return [name if names.count(name) == 1 else f"{name}.{names[: i + 1].count(name)}" for i, name in enumerate(names)]
