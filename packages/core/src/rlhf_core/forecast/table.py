"""A forecast as text: a line per role, a line per phase, and the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlhf_core.forecast.forecast import Forecast

__all__ = ["forecast_table"]

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def forecast_table(found: Forecast) -> str:
    """Return the lines of a forecast."""
    unit, size = next(((name, size) for name, size in UNITS if found.peak >= size), UNITS[-1])

    def shown(count: int) -> str:
        return f"{count / size:.2f}" if count else "0"

    roles: list[tuple[str, ...]] = [
        ("role", "weights", "gradients", "optimizer", "activations", "inference", "cache", "buffers", "micro-batches")
    ]
    for name, role in found.roles.items():
        each = role.memory
        parts = (
            each.weights,
            each.gradients,
            each.optimizer,
            each.activations,
            each.inference,
            each.cache,
            each.buffers,
        )
        kind = "trained" if role.trained else "frozen"
        roles.append((f"{name} ({kind})", *map(shown, parts), f"{role.rounds} x {role.rows} rows"))
    phases = [("phase", "memory", "seconds")]
    for phase in found.phases:
        seconds = "" if phase.seconds is None else f"{phase.seconds:.3g}"
        phases.append((phase.name, shown(phase.bytes), seconds))
    options = found.options
    device = options.gpu or ("device" if options.gpus == 1 else "devices")
    lines = [
        f"{unit} on each of {options.gpus} {device}, rows of {found.prompt} + {found.completion} tokens",
        *_columns(roles),
    ]
    lines += ["", *_columns(phases), "", _answer(found, unit, size)]
    for dtype, rates in found.rates.items():
        reached = f"{rates.operations / 1e12:.3g} TFLOP/s and {rates.bytes / 1e9:.3g} GB/s"
        lines.append(f"rates in {dtype}: {reached}, {rates.origin}")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def _answer(found: Forecast, unit: str, size: int) -> str:
    """Return the line on whether it fits."""
    worst = max(found.phases, key=lambda phase: phase.bytes)
    peak = f"peak {found.peak / size:.2f} {unit} in {worst.name!r}"
    if found.fits is None:
        return f"{peak}; pass the memory or the type of a device to check that this fits"
    left = (found.usable - found.peak) / size
    room = f"{found.usable / size:.2f} of {found.device_bytes / size:.2f} {unit}, {found.options.reserve:.0%} kept in reserve"
    verdict = f"fits, {left:.2f} {unit} left" if found.fits else f"does not fit, {-left:.2f} {unit} too many"
    return f"{peak}: {verdict} ({room})"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows in columns: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
