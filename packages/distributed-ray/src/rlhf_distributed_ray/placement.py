"""Layout of roles and engines over the bundles of a Ray cluster, checked before anything starts.

A bundle has room for one rank of each role that shares it, and whole GPUs: Ray packs shares of a GPU onto as few devices as it
can, and only another bundle's device is surely another one, which ranks of one role need. Who sits in a bundle shares what it
has in equal parts. A role of `nodes` x `devices` workers has a placement group per node, whose bundles Ray keeps on one node;
else the strategy of its place decides the placement of its bundles. `rlhf_distributed_ray.places` has the language of
places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor

from rlhf_core.errors import OptionError, UsageError, option
from rlhf_distributed_ray.places import Place, Resources

__all__ = ["Layout", "Seat", "check_capacity", "check_devices", "find_lack", "lay_out", "total"]

GRAIN = 10_000  # Ray counts resources in ten-thousandths


@dataclass(frozen=True)
class Seat:
    """Bundle of one worker: `bundle` of placement group `group`."""

    group: int
    bundle: int


@dataclass(frozen=True)
class Layout:
    """Placement groups as lists of bundles (resources by name), and the seats of everyone by name and rank."""

    groups: tuple[tuple[Resources, ...], ...]
    strategies: tuple[str, ...]
    """strategy of each group"""
    seats: Mapping[str, tuple[Seat, ...]]
    apart: tuple[frozenset[int], ...] = ()
    """sets of groups that must be on different nodes"""
    spread: tuple[frozenset[int], ...] = ()
    """sets of groups that go to as many nodes as have room for them"""

    def sitting(self, seat: Seat) -> list[str]:
        """Names of those who sit in a bundle."""
        return [name for name, seats in self.seats.items() if seat in seats]

    def chains(self, names: Iterable[str]) -> list[list[str]]:
        """`names` in lists of those who share bundles, with each other or through others, and so work in turn."""
        found: list[tuple[list[str], set[Seat]]] = []
        for name in names:
            mine = set(self.seats[name])
            meeting = [each for each in found if each[1] & mine]
            found = [each for each in found if not each[1] & mine]
            members = [member for each in meeting for member in each[0]]
            found.append(([*members, name], mine.union(*(each[1] for each in meeting))))
        return [members for members, _ in found]

    def share(self, seat: Seat) -> Resources:
        """Return the resources of one worker in a bundle: an equal part, so that all of them fit."""
        parts = len(self.sitting(seat))
        return {name: _part(amount, parts) for name, amount in self.groups[seat.group][seat.bundle].items()}


def lay_out(places: Sequence[Place], cpus: float, gpus: bool) -> Layout:
    """Bundles and seats for `places`: `cpus` for each worker, and with `gpus` as many in a bundle as its place requests.

    Raises:
        UsageError: a bundle would have nothing.
    """
    strategies: list[str] = []
    sets: dict[str, list[frozenset[int]]] = {"STRICT_SPREAD": [], "SPREAD": []}
    seats: dict[str, tuple[Seat, ...]] = {}
    place_of: list[Place] = []
    for place in places:
        first, members = len(strategies), place.members
        if place.strategy == "STRICT_PACK" or all(shape.devices == 1 for shape in members.values()):
            seats |= {n: tuple(Seat(first, rank) for rank in range(shape.workers)) for n, shape in members.items()}
            strategies.append(place.strategy)
        else:
            most = max(shape.devices for shape in members.values())
            for name, shape in members.items():
                width = shape.devices if shape.devices > 1 else most  # a plain number fills nodes in turn
                seats[name] = tuple(Seat(first + r // width, r % width) for r in range(shape.workers))
            nodes = max(seat.group for name in members for seat in seats[name]) + 1 - first
            strategies += ["STRICT_PACK"] * nodes
            if place.strategy in sets:
                sets[place.strategy].append(frozenset(range(first, first + nodes)))
        place_of += [place] * (len(strategies) - first)
    groups: list[list[Resources]] = [[] for _ in strategies]
    occupied = [seat for own in seats.values() for seat in own]
    for seat in sorted(set(occupied), key=lambda seat: (seat.group, seat.bundle)):
        place = place_of[seat.group]
        bundle = {"CPU": occupied.count(seat) * cpus, **({"GPU": float(place.devices)} if gpus else {})}
        asked = {**bundle, **place.resources}
        some = {name: amount for name, amount in asked.items() if amount}
        if not some:  # Ray has no such bundle
            raise OptionError("place", f"gives {', '.join(place.members)} no resource at all; give CPU or another one")
        groups[seat.group].append(some)
    apart, spread = (tuple(each) for each in sets.values())
    return Layout(tuple(map(tuple, groups)), tuple(strategies), seats, apart, spread)


def find_lack(layout: Layout, nodes: Sequence[Resources]) -> str:
    """One line about what nodes with these resources lack for the layout: of a resource, on one node, or nodes; else empty."""
    people = ", ".join(f"{len(seats)} x {name}" for name, seats in layout.seats.items())
    for resource in dict.fromkeys(name for group in layout.groups for bundle in group for name in bundle):
        wanted = total(resource, (bundle for group in layout.groups for bundle in group))
        have = total(resource, nodes)
        if wanted > have + 1e-9:
            return f"launcher ray needs {wanted:g} {resource} for {people}, but the cluster has {have:g}"
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        for group, strategy in zip(layout.groups, layout.strategies, strict=True):
            whole = [total(resource, group)] if strategy == "STRICT_PACK" else [total(resource, [b]) for b in group]
            if max(whole) > largest + 1e-9:
                return f"launcher ray needs {max(whole):g} {resource} on one node, but the largest node has {largest:g}"
    spread = [len(g) for g, s in zip(layout.groups, layout.strategies, strict=True) if s == "STRICT_SPREAD"]
    most = max([*spread, *map(len, layout.apart)], default=0)
    return f"STRICT_SPREAD needs {most} nodes, but the cluster has {len(nodes)}" if most > len(nodes) else ""


def check_capacity(layout: Layout, nodes: Sequence[Resources]) -> None:
    """Check that nodes with these resources can hold the layout.

    Raises:
        UsageError: it asks for more of a resource than there is, or than a node has, or for more nodes than there are.
    """
    if lack := find_lack(layout, nodes):
        fewer = f"{option('workers')}, {option('engines')}, {option('place')} or {option('cpus')}"
        raise UsageError(f"{lack}; request less with {fewer}, or wait for an autoscaling cluster with {option('wait')}")


def check_devices(role: str, devices: Sequence[Iterable[tuple[str, str]]]) -> None:
    """Check that ranks of a role, which see `devices` (node, GPU), share no GPU. NCCL would refuse that much later.

    Raises:
        UsageError: two do.
    """
    taken: dict[tuple[str, str], int] = {}
    for rank, mine in enumerate(devices):
        for device in mine:
            if device in taken:
                raise UsageError(
                    f"ranks {taken[device]} and {rank} of role {role} were given the same GPU {device[1]} of node "
                    f"{device[0]}; use {option('gpus', 'on')}"
                )
            taken[device] = rank


def _part(amount: float, parts: int) -> float:
    """An equal part of an amount, which Ray does not round up; whole ones stay whole."""
    part = floor(amount * GRAIN / parts + 1e-6) / GRAIN
    return float(floor(part)) if part > 1 else part  # Ray has no share of several


def total(resource: str, of: Iterable[Resources]) -> float:
    return sum(each.get(resource, 0.0) for each in of)
