"""Parts of an engine that sleep and wake independently."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["PARTS", "parts_of", "tags_of"]

TAGS = {"weights": "weights", "cache": "kv_cache"}
"""Parts, and what vLLM calls them."""

PARTS = frozenset(TAGS)


def parts_of(part: str) -> frozenset[str]:
    """Return the parts that a call is about."""
    return PARTS if part == "all" else frozenset({part})


def tags_of(parts: Iterable[str]) -> list[str]:
    """Return what vLLM calls the parts, weights first."""
    return [TAGS[each] for each in sorted(parts, reverse=True)]
