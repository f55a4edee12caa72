"""The language of `--launcher.place`: who shares bundles with whom, how many there are, and what each has.

    actor+reference@8, critic+reward@4:spread, engine[tp=2]@4,RAM=64

Each place is `NAMES@SIZE[:STRATEGY][,RESOURCE=AMOUNT …]`. Names are roles of the run and `engine`, the rollout engines, joined
by `+`; rank k of each is in bundle k. A size is a number of bundles, or `NODESxDEVICES`, whose devices are on one node.
Amounts are those of a bundle. `engine` may be left out: then engines sit with the role that they sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhf_core.errors import OptionError, UsageError, option
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["ENGINE", "STRATEGIES", "Place", "Resources", "Shape", "check_engines_alone", "parse_places", "parse_shape"]

Resources = Mapping[str, float]

ENGINE = "engine"
STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
TENSOR_PARALLEL = re.compile(r"(.+)\[tp=([1-9]\d*)\]")


@dataclass(frozen=True)
class Shape:
    """Workers of one role."""

    nodes: int
    """number of nodes, or workers anywhere"""
    devices: int = 1
    """number of workers on one node"""
    strategy: str = ""
    """Ray's placement strategy over nodes; empty takes the launcher's"""

    @property
    def workers(self) -> int:
        """Return the number of workers."""
        return self.nodes * self.devices


@dataclass(frozen=True)
class Place:
    """Those who share bundles: rank k of each is in bundle k."""

    members: Mapping[str, Shape]
    strategy: str = "PACK"
    resources: Resources = field(default_factory=dict)
    """resources of a bundle, in addition to or in place of the calculated ones"""
    devices: int = 1
    """GPUs of a bundle, where GPUs are used: more than one for a rollout engine that computes on several"""


def parse_shape(text: str, field: str) -> Shape:
    """`2` workers, each in its own bundle; `2x4`: nodes x devices; either with a strategy: `2x4:STRICT_SPREAD`.

    Raises:
        UsageError: it is none of these.
    """
    size, _, strategy = text.partition(":")
    parts = size.lower().split("x")
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(parts) <= 2 and len(numbers) == len(parts) and all(numbers) and strategy.upper() in ("", *STRATEGIES):
        return Shape(numbers[0], numbers[1] if len(numbers) == 2 else 1, strategy.upper())
    raise OptionError(field, f"{text!r}: give a number of workers, or NODESxDEVICES such as 2x4")


def parse_places(text: str, roles: Sequence[str], sampled: str, strategy: str, devices: int) -> list[Place]:
    """The places of a partition of `roles`, with rollout engines of `devices` GPUs each if a role is `sampled`.

    Raises:
        UsageError: it is no partition, or engines are given another number of devices than they take.
    """
    places: list[Place] = []
    for part in re.split(r"[,\s]+", text.strip()):
        if "@" in part:
            places.append(_parse_place(part, [*roles, *([ENGINE] if sampled else [])], strategy, devices))
        elif places and "=" in part:
            places[-1] = _with_resource(places[-1], part)
        else:
            raise OptionError(
                "place", f"{part!r}: give NAMES@BUNDLES, such as actor+reference@8, or together or separate"
            )
    _check_partition(places, roles)
    if sampled and not any(ENGINE in place.members for place in places):
        home = next(k for k, place in enumerate(places) if sampled in place.members)
        places[home] = replace(places[home], members={**places[home].members, ENGINE: places[home].members[sampled]})
    return places


def check_engines_alone(place: Place, devices: int) -> None:
    """Check that rollout engines of several GPUs share them with no role, each rank of which takes one.

    Raises:
        UsageError: they do.
    """
    others = [name for name in place.members if name != ENGINE]
    if devices > 1 and ENGINE in place.members and others:
        raise OptionError(
            "place",
            f"a rollout engine of {devices} GPUs cannot share them with {', '.join(others)}, whose ranks use one "
            f"GPU each; use {option('place', 'separate')}, or give {ENGINE} a separate place",
        )


def _parse_place(part: str, known: Sequence[str], strategy: str, devices: int) -> Place:
    """One `NAMES@SIZE[:STRATEGY]`."""
    names, _, size = part.partition("@")
    shape = parse_shape(size, "place")
    members: dict[str, Shape] = {}
    for word in names.split("+"):
        match = TENSOR_PARALLEL.fullmatch(word)
        name = match[1] if match else word
        if name not in known:
            near = did_you_mean(name, known)
            raise OptionError("place", f"{part!r}: this run has no {name!r}{near}; it has {', '.join(known)}")
        if match and (name != ENGINE or int(match[2]) != devices):
            raise OptionError(
                "place",
                f"{word!r}: each engine of this run uses {devices} GPU{'s' * (devices > 1)}; change that with the "
                "options of the rollout",
            )
        if name in members:
            raise OptionError("place", f"{part!r} names {name} twice; name it once")
        members[name] = replace(shape, strategy="")
    return Place(members, shape.strategy or strategy, devices=devices if set(members) == {ENGINE} else 1)


def _with_resource(place: Place, part: str) -> Place:
    """`place` whose bundles have a resource: `NAME=AMOUNT`."""
    name, _, amount = part.rpartition("=")
    try:
        number = float(amount)
    except ValueError:
        number = -1.0
    if not name or not 0 <= number < float("inf") or (name == "GPU" and number != int(number)):
        raise OptionError("place", f"{part!r}: give RESOURCE=AMOUNT, such as GPU=0 or RAM=64, and whole GPUs")
    if name == "object_store_memory" or (name.upper() in ("CPU", "GPU") and name != name.upper()):
        known = f"; Ray's name is {name.upper()}" if name != "object_store_memory" else ""
        raise OptionError("place", f"{part!r}: a worker cannot request {name}{known}")
    return replace(place, resources={**place.resources, name: number})


def _check_partition(places: Sequence[Place], roles: Sequence[str]) -> None:
    """Check that every role has one place."""
    placed = [name for place in places for name in place.members]
    if missing := [role for role in roles if role not in placed]:
        raise UsageError(
            f"{option('place')} has no place for {', '.join(missing)}; add {missing[0]}@1 as a separate place, or "
            f"+{missing[0]} to an existing place"
        )
    for name in placed:
        if placed.count(name) > 1:
            raise OptionError("place", f"gives {name} two places; name it once")
