"""Who sits where: roles and engines over the bundles of a Ray cluster, checked before anything starts.

A bundle has room for one rank of each role that shares it, and whole GPUs: Ray packs shares of a GPU onto as few devices as it
can, and only another bundle's device is surely another one, which ranks of one role need. A role of `nodes` x `devices`
workers has a placement group per node, whose bundles Ray keeps on one node; else a group's strategy says how its bundles lie
to each other. `together` lets rank k of every role, and the engines, share bundles; `separate` gives each role and the
engines bundles of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from rlhf_core.errors import OptionError, UsageError, option

__all__ = ["STRATEGIES", "Layout", "Seat", "Shape", "check_capacity", "check_devices", "lay_out", "parse_shape"]

Resources = Mapping[str, float]

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class Shape:
    """Workers of one role."""

    nodes: int
    """nodes, or workers anywhere"""
    devices: int = 1
    """workers that sit on one node"""
    strategy: str = ""
    """how Ray lays them over nodes; as for everyone where empty"""

    @property
    def workers(self) -> int:
        """How many there are."""
        return self.nodes * self.devices


@dataclass(frozen=True)
class Seat:
    """Where one worker sits: bundle `bundle` of placement group `group`."""

    group: int
    bundle: int


@dataclass(frozen=True)
class Layout:
    """Placement groups as lists of bundles (resources by name), and the seats of everyone by name and rank."""

    groups: tuple[tuple[Resources, ...], ...]
    strategies: tuple[str, ...]
    """of each group"""
    seats: Mapping[str, tuple[Seat, ...]]
    share: Resources
    """resources one worker asks for"""
    apart: tuple[frozenset[int], ...] = ()
    """sets of groups that must be on different nodes"""


def parse_shape(text: str, field: str) -> Shape:
    """`2` workers, each in a bundle of its own; `2x4`: nodes x devices; either with a strategy: `2x4:STRICT_SPREAD`.

    Raises:
        UsageError: it is none of these.
    """
    size, _, strategy = text.partition(":")
    parts = size.lower().split("x")
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(parts) <= 2 and len(numbers) == len(parts) and all(numbers) and strategy.upper() in ("", *STRATEGIES):
        return Shape(numbers[0], numbers[1] if len(numbers) == 2 else 1, strategy.upper())
    raise OptionError(field, f"{text!r}: give a number of workers, or NODESxDEVICES such as 2x4")


def lay_out(
    roles: Mapping[str, Shape], engines: int, together: bool, cpus: float, gpus: float, strategy: str = "PACK"
) -> Layout:
    """Bundles and seats for `roles` and `engines` rollout engines (`engine`), each worker with `cpus` and `gpus`."""
    everyone = {**roles, **({"engine": Shape(engines)} if engines else {})}
    strategies: list[str] = []
    apart: list[frozenset[int]] = []
    seats: dict[str, tuple[Seat, ...]] = {}
    for names in [list(everyone)] if together else [[name] for name in everyone]:
        laid = (not together and everyone[names[0]].strategy) or strategy
        first = len(strategies)
        if laid == "STRICT_PACK" or all(everyone[name].devices == 1 for name in names):
            seats |= {name: tuple(Seat(first, rank) for rank in range(everyone[name].workers)) for name in names}
            strategies.append(laid)
            continue
        most = max(everyone[name].devices for name in names)
        for name in names:
            width = everyone[name].devices if everyone[name].devices > 1 else most  # a plain number fills nodes in turn
            seats[name] = tuple(Seat(first + r // width, r % width) for r in range(everyone[name].workers))
        nodes = max(seat.group for name in names for seat in seats[name]) + 1 - first
        strategies += ["STRICT_PACK"] * nodes
        if laid == "STRICT_SPREAD":
            apart.append(frozenset(range(first, first + nodes)))
    sitting = Counter(seat for own in seats.values() for seat in own)
    groups: list[list[Resources]] = [[] for _ in strategies]
    for seat in sorted(sitting, key=lambda seat: (seat.group, seat.bundle)):
        whole = {"GPU": float(ceil(sitting[seat] * gpus - 1e-9))} if gpus else {}  # three thirds are one
        groups[seat.group].append({"CPU": sitting[seat] * cpus, **whole})
    share = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    return Layout(tuple(map(tuple, groups)), tuple(strategies), seats, share, tuple(apart))


def check_capacity(layout: Layout, nodes: Sequence[Resources]) -> None:
    """Whether nodes with these resources can hold the layout.

    Raises:
        UsageError: it asks for more of a resource than there is, or than a node has, or for more nodes than there are.
    """
    people = ", ".join(f"{len(seats)} x {name}" for name, seats in layout.seats.items())
    for resource in ("CPU", "GPU"):
        advice = f"lower {option('workers')}, {option('engines')} or {option(f'{resource.lower()}s')}"
        wanted = _sum(resource, (bundle for group in layout.groups for bundle in group))
        have = _sum(resource, nodes)
        if wanted > have + 1e-9:
            raise UsageError(
                f"launcher ray needs {wanted:g} {resource} for {people}, the cluster has {have:g}; {advice}"
            )
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        for group, strategy in zip(layout.groups, layout.strategies, strict=True):
            whole = [_sum(resource, group)] if strategy == "STRICT_PACK" else [_sum(resource, [b]) for b in group]
            if max(whole) > largest + 1e-9:
                raise UsageError(
                    f"launcher ray needs {max(whole):g} {resource} on one node, the largest has {largest:g}; {advice}"
                )
    spread = [len(g) for g, s in zip(layout.groups, layout.strategies, strict=True) if s == "STRICT_SPREAD"]
    most = max([*spread, *map(len, layout.apart)], default=0)
    if most > len(nodes):
        raise UsageError(f"STRICT_SPREAD needs {most} nodes, the cluster has {len(nodes)}")


def check_devices(role: str, devices: Sequence[Iterable[tuple[str, str]]]) -> None:
    """Whether ranks of a role, each of which sees `devices` (node, GPU), share none: NCCL would refuse that much later.

    Raises:
        UsageError: two do.
    """
    taken: dict[tuple[str, str], int] = {}
    for rank, mine in enumerate(devices):
        for device in mine:
            if device in taken:
                raise UsageError(
                    f"ranks {taken[device]} and {rank} of role {role} were given the same GPU {device[1]} of node "
                    f"{device[0]}; use {option('gpus', 1)}"
                )
            taken[device] = rank


def _sum(resource: str, of: Iterable[Resources]) -> float:
    return sum(each.get(resource, 0.0) for each in of)
