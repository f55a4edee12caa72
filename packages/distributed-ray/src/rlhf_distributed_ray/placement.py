"""Who sits where: roles and engines over the bundles of a Ray cluster, checked before anything starts.

A role is `nodes` x `devices` workers: `nodes` bundles, each with room for `devices` of them. Ray keeps a bundle on one node;
how bundles lie to each other is its strategy's business. `together` lets rank k of every role, and the engines, share
bundles; `separate` gives each role and the engines a placement group of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_core.errors import UsageError

__all__ = ["STRATEGIES", "Layout", "Seat", "Shape", "check_capacity", "lay_out", "parse_shape"]

Resources = Mapping[str, float]

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class Shape:
    """Workers of one role."""

    nodes: int
    """bundles"""
    devices: int = 1
    """workers of each bundle"""
    strategy: str = ""
    """how Ray lays the bundles over nodes; as for everyone where empty"""

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


def parse_shape(text: str, flag: str) -> Shape:
    """`2` workers, each in a bundle of its own; `2x4`: nodes x devices; either with a strategy: `2x4:STRICT_SPREAD`.

    Raises:
        UsageError: it is none of these.
    """
    size, _, strategy = text.partition(":")
    parts = size.lower().split("x")
    numbers = [int(part) for part in parts if part.isdigit()]
    if len(parts) <= 2 and len(numbers) == len(parts) and all(numbers) and strategy.upper() in ("", *STRATEGIES):
        return Shape(numbers[0], numbers[1] if len(numbers) == 2 else 1, strategy.upper())
    raise UsageError(f"{flag} {text!r}: give a number of workers, or NODESxDEVICES such as 2x4")


def lay_out(
    roles: Mapping[str, Shape], engines: int, together: bool, cpus: float, gpus: float, strategy: str = "PACK"
) -> Layout:
    """Bundles and seats for `roles` and `engines` rollout engines (`engine`), each worker with `cpus` and `gpus`."""
    share = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    everyone = {**roles, **({"engine": Shape(engines)} if engines else {})}
    groups: list[list[dict[str, float]]] = []
    strategies: list[str] = []
    seats: dict[str, tuple[Seat, ...]] = {}
    for name, shape in everyone.items():
        if not together or not groups:
            groups.append([])
            strategies.append(shape.strategy or strategy)
        bundles = groups[-1]
        bundles += [{} for _ in range(shape.nodes - len(bundles))]
        for bundle in bundles[: shape.nodes]:
            for resource, amount in share.items():
                bundle[resource] = bundle.get(resource, 0.0) + shape.devices * amount
        seats[name] = tuple(Seat(len(groups) - 1, rank // shape.devices) for rank in range(shape.workers))
    return Layout(tuple(map(tuple, groups)), tuple(strategies), seats, share)


def check_capacity(layout: Layout, nodes: Sequence[Resources]) -> None:
    """Whether nodes with these resources can hold the layout.

    Raises:
        UsageError: it asks for more of a resource than there is, or than a node has, or for more nodes than there are.
    """
    people = ", ".join(f"{len(seats)} x {name}" for name, seats in layout.seats.items())
    for resource in ("CPU", "GPU"):
        advice = f"lower --launcher.workers, --launcher.engines or --launcher.{resource.lower()}s"
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
    for group, strategy in zip(layout.groups, layout.strategies, strict=True):
        if strategy == "STRICT_SPREAD" and len(group) > len(nodes):
            raise UsageError(f"STRICT_SPREAD needs {len(group)} nodes, the cluster has {len(nodes)}")


def _sum(resource: str, of: Iterable[Resources]) -> float:
    return sum(each.get(resource, 0.0) for each in of)
