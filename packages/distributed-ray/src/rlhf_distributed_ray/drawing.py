"""A drawing of a layout: a table per place, with who sits in which bundle and the memory of each, by formula.

    place 1: PACK, 4 bundles of 0.5 CPU, 1 GPU
    bundle      0      1      2      3  GiB idle  at most
    actor       0      1      2      3     30.20    41.70
    engine      0      1      2      3     15.10    15.10
    GiB     56.80  56.80  56.80  56.80

Roles of a bundle work in turn: it holds all of them idle, and what one adds at work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_core.contract.options import RunConfig
from rlhf_distributed_ray.placement import Layout, Seat
from rlhf_distributed_ray.places import ENGINE

__all__ = ["WorkerMemory", "draw_layout", "forecast_memory"]

GIB = 2**30
COLUMNS = 16
"""Bundles of a place that are drawn; those after them are counted."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of a worker on its device."""

    idle: int
    """bytes between its calls"""
    work: int
    """bytes that a call adds at most"""

    @property
    def most(self) -> int:
        """At work."""
        return self.idle + self.work


def forecast_memory(config: RunConfig, layout: Layout, sampled: str) -> dict[str, WorkerMemory]:
    """Forecast the memory of a worker of each role, and of an engine that samples `sampled`, as `rlhf-run plan` does."""
    from rlhf_core.forecast.forecast import Forecast, forecast
    from rlhf_core.forecast.options import PlanOptions

    known: dict[int, Forecast] = {}

    def of(workers: int) -> Forecast:
        if workers not in known:
            known[workers] = forecast(config, PlanOptions(gpus=workers))
        return known[workers]

    held: dict[str, WorkerMemory] = {}
    for name, seats in layout.seats.items():
        if name == ENGINE:
            continue
        role = of(len(seats)).roles[name]
        held[name] = WorkerMemory(role.memory.resident, role.memory.training if role.trained else role.memory.inference)
    if ENGINE in layout.seats:
        engines = len(layout.seats[ENGINE])
        alike = engines if not config.batch_size % engines else len(layout.seats[sampled])
        role = of(alike).roles[sampled]
        copied = role.size.parameters * role.size.compute_bytes if config.providers["rollout"].exact else 0
        held[ENGINE] = WorkerMemory(copied + role.memory.cache, 0)
    return held


def draw_layout(layout: Layout, held: Mapping[str, WorkerMemory]) -> str:
    """The lines of a drawing."""
    lines = []
    for group, (bundles, strategy) in enumerate(zip(layout.groups, layout.strategies, strict=True)):
        shown = range(min(len(bundles), COLUMNS))
        first = ", ".join(f"{amount:g} {name}" for name, amount in bundles[0].items())
        alike = "" if all(bundle == bundles[0] for bundle in bundles) else " (the first)"
        people = [name for name, seats in layout.seats.items() if any(seat.group == group for seat in seats)]
        table = [["bundle", *map(str, shown)], *([name, *_ranks(layout, name, group, shown)] for name in people)]
        table.append(["GiB", *(_gib(_bundle_bytes(layout, held, Seat(group, bundle))) for bundle in shown)])
        notes = ["  GiB idle  at most", *(f"  {_gib(held[n].idle):>8}  {_gib(held[n].most):>7}" for n in people), ""]
        count = f"{len(bundles)} bundle{'s' * (len(bundles) > 1)}"
        rest = f", {COLUMNS} of them shown" if len(bundles) > COLUMNS else ""
        lines.append(f"place {group + 1}: {strategy}, {count} of {first}{alike}{rest}")
        lines += [(line + note).rstrip() for line, note in zip(_columns(table), notes, strict=True)]
        lines.append("")
    return "\n".join(lines[:-1])


def _ranks(layout: Layout, name: str, group: int, bundles: Sequence[int]) -> list[str]:
    """The rank that sits in each of these bundles, or a point."""
    seats = layout.seats[name]
    places = [Seat(group, bundle) for bundle in bundles]
    return [str(seats.index(seat)) if seat in seats else "." for seat in places]


def _bundle_bytes(layout: Layout, held: Mapping[str, WorkerMemory], seat: Seat) -> int:
    """Most bytes that those in a bundle hold, of whom one is at work."""
    sitting = [held[name] for name in layout.sitting(seat)]
    return sum(each.idle for each in sitting) + max(each.work for each in sitting)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns: names to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
