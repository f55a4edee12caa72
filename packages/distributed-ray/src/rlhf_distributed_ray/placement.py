"""Who sits where: roles and engines over the bundles of a Ray cluster, checked before anything starts.

A role is `nodes` x `devices` workers. `together` puts rank k of every role, and the engines, on the same bundle k; `separate`
gives each role and each engine bundles of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_core.errors import UsageError

__all__ = ["Layout", "Seat", "Shape", "check_capacity", "lay_out", "parse_shape"]


@dataclass(frozen=True)
class Shape:
    """Workers of one role."""

    nodes: int
    devices: int

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

    groups: tuple[tuple[Mapping[str, float], ...], ...]
    seats: Mapping[str, tuple[Seat, ...]]
    share: Mapping[str, float]
    """resources one worker asks for"""


def parse_shape(text: str, flag: str) -> Shape:
    """`2` workers on one node, or `2x4`: nodes x devices.

    Raises:
        UsageError: it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) in (1, 2) and all(part.isdigit() and int(part) > 0 for part in parts):
        numbers = [int(part) for part in parts]
        return Shape(1, numbers[0]) if len(numbers) == 1 else Shape(*numbers)
    raise UsageError(f"{flag} {text!r}: give a number of workers, or NODESxDEVICES such as 2x4")


def lay_out(roles: Mapping[str, Shape], engines: int, together: bool, cpus: float, gpus: float) -> Layout:
    """Bundles and seats for `roles` and `engines` rollout engines (`engine`), each worker with `cpus` and `gpus`."""
    share = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    everyone = {**{name: shape.workers for name, shape in roles.items()}, **({"engine": engines} if engines else {})}
    if not together:
        groups = tuple(tuple(dict(share) for _ in range(workers)) for workers in everyone.values())
        seats = {name: tuple(Seat(g, k) for k in range(everyone[name])) for g, name in enumerate(everyone)}
        return Layout(groups, seats, share)
    bundles: list[dict[str, float]] = [{} for _ in range(max(everyone.values()))]
    for workers in everyone.values():
        for bundle in bundles[:workers]:
            for resource, amount in share.items():
                bundle[resource] = bundle.get(resource, 0.0) + amount
    seats = {name: tuple(Seat(0, k) for k in range(workers)) for name, workers in everyone.items()}
    return Layout((tuple(bundles),), seats, share)


def check_capacity(layout: Layout, available: Mapping[str, float], nodes: int, spread: bool) -> None:
    """Whether the cluster can hold the layout.

    Raises:
        UsageError: it asks for more of a resource, or for more nodes, than there is.
    """
    for resource in ("CPU", "GPU"):
        wanted = sum(bundle.get(resource, 0.0) for group in layout.groups for bundle in group)
        have = available.get(resource, 0.0)
        if wanted > have + 1e-9:
            raise UsageError(
                f"launcher ray needs {wanted:g} {resource} for {_people(layout)}, the cluster has {have:g}; "
                f"lower --launcher.workers, --launcher.engines or --launcher.{resource.lower()}s"
            )
    widest = max(len(group) for group in layout.groups)
    if spread and widest > nodes:
        raise UsageError(f"--launcher.strategy STRICT_SPREAD needs {widest} nodes, the cluster has {nodes}")


def _people(layout: Layout) -> str:
    return ", ".join(f"{len(seats)} x {name}" for name, seats in layout.seats.items())
