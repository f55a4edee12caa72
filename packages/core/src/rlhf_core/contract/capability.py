"""Capabilities: what a base class declares of its providers, each with a default that a subclass may replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["OPTIONAL", "Capability", "replaceable"]

Base = TypeVar("Base")


class Capability:
    """A default of a base class, which a subclass replaces by a class attribute, a property or a field.

    Unlike a property it leaves instances free to hold a field of its name, and a field without a default stays required.
    """

    def __init__(self, default: Callable[[Any], Any]) -> None:
        self.default = default
        self.__doc__ = default.__doc__

    def __get__(self, provider: object, owner: type) -> Any:
        if provider is None:  # `dataclass` looks there for the default of a field
            raise AttributeError(f"{owner.__name__} declares this per instance")
        return self.default(provider)


def replaceable(base: type[Base]) -> type[Base]:
    """Turn the properties of `base` into capabilities; type checkers keep seeing properties."""
    for name, value in list(vars(base).items()):
        if isinstance(value, property):
            assert value.fget is not None
            setattr(base, name, Capability(value.fget))
    return base


OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "data": ("shuffle_buffer",),
    "loss": ("aggregate", "length"),
    "algorithm": ("kl", "shaping", "dynamic", "exports", "cache"),
}
"""Capabilities by kind that a provider may leave to its users, as an option of that name."""
