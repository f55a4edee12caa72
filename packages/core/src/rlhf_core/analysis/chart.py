"""Line charts as inline SVG: axes and units in words, smoothed lines over faint raw ones, bands for intervals.

Colors are the classes `c0`, `c1`, … of the page, so that a chart follows the page's light or dark look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rlhf_core.analysis.style import COLORS, FEW, smooth, thin

__all__ = ["Line", "chart", "round_ticks"]

WIDTH, PLOT = 420, 182
"""Width of a chart and height of its plot, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 28, 40
"""Margins in pixels."""
ROW = 15
"""Height of a row of the legend, in pixels."""
TICKS = 5
"""Ticks of an axis, about."""
TINY = 1e-30
"""Smaller numbers are drawn as zero."""
NOISE = 1e-4
"""Part of a tick's distance by which a curve may leave the axis: a KL of -1e-9 needs no tick below zero."""


@dataclass(frozen=True)
class Line:
    """Points of a curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """lower ends of an interval, if there is one"""
    high: Sequence[float] | None = None
    color: int = 0
    """number of the color: one for each method or metric"""


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """Return an SVG element. Points that are not finite are left out.

    Args:
        title: what is drawn, in words.
        x_label: horizontal axis with its unit.
        y_label: vertical axis with its unit.
        lines: the curves, at least one with a point.
    """
    x_all = [x for line in lines for x in line.x]
    y_all = [y for line in lines for y in (*line.y, *(line.low or ()), *(line.high or ())) if math.isfinite(y)]
    x_ticks, y_ticks = round_ticks(min(x_all), max(x_all), whole=True), round_ticks(min(y_all), max(y_all))
    keys = _legend(lines) if len(lines) > 1 else []
    rows = max((row for row, *_ in keys), default=-1) + 1
    top = TOP + ROW * rows

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), top + (1 - up) * PLOT

    bottom = top + PLOT
    parts = [f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>')
    for row, x, line in keys:
        parts.append(
            f'<rect class="key c{line.color % len(COLORS)}" x="{x:.0f}" y="{24 + ROW * row}" width="9" height="9"/>'
        )
        parts.append(f'<text class="tick" x="{x + 13:.0f}" y="{32 + ROW * row}">{escape(line.label)}</text>')
    for tick, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x, _ = place(tick, y_ticks[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>')
    at = f'x="12" y="{top + PLOT / 2}" transform="rotate(-90 12 {top + PLOT / 2})"'
    parts.append(f'<text class="label" {at} text-anchor="middle">{escape(y_label)}</text>')
    for line in lines:
        parts += _curve(line, place)
    return "".join([*parts, "</svg>"])


def round_ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return round numbers from about `low` to about `high`, two or more; `whole` ones only if asked for."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < TINY:  # one value: half of it on both sides
        low, high = (low - size / 2, high + size / 2) if size >= TINY else (0.0, 1.0)
    rough = max((high - low) / TICKS, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(power * factor for factor in factors if rough <= power * factor * (1 + 1e-9))
    first, last = math.floor(low / step + NOISE), math.ceil(high / step - NOISE)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, with enough digits to distinguish them."""
    for digits in range(2, 17):
        labels = [_number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(set(ticks)):
            break
    return labels


def _curve(line: Line, place: Callable[[float, float], tuple[float, float]]) -> list[str]:
    """Return the elements of a curve: its band, its raw and its smoothed points."""
    color = f"c{line.color % len(COLORS)}"
    finite = [k for k, y in enumerate(line.y) if math.isfinite(y)]
    even = smooth if len(finite) > FEW else list
    shown = [finite[k] for k in thin(len(finite))]

    def at(values: Sequence[float]) -> list[tuple[float, float]]:
        value = dict(zip(finite, values, strict=True))
        return [place(line.x[k], value[k]) for k in shown if math.isfinite(value[k])]

    raw = at([line.y[k] for k in finite])
    parts = []
    if line.low is not None and line.high is not None:
        lower, upper = (at(even([ends[k] for k in finite])) for ends in (line.low, line.high))
        parts.append(f'<polygon class="band {color}" points="{_points([*upper, *reversed(lower)])}"/>')
    if len(finite) <= FEW:
        parts.append(f'<polyline class="line {color}" points="{_points(raw)}"/>')
        parts += [f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in raw]
    else:
        parts.append(f'<polyline class="line raw {color}" points="{_points(raw)}"/>')
        parts.append(f'<polyline class="line {color}" points="{_points(at(even([line.y[k] for k in finite])))}"/>')
    hover = ";".join(
        f"{x:.1f},{y:.1f},{_number(line.x[k])},{_number(line.y[k])}" for (x, y), k in zip(raw, shown, strict=True)
    )
    return [f'<g data-label="{escape(line.label)}" data-points="{hover}">', *parts, "</g>"]


def _legend(lines: Sequence[Line]) -> list[tuple[int, float, Line]]:
    """Return row, place in it in pixels, and curve of every name under the title."""
    keys: list[tuple[int, float, Line]] = []
    row, x = 0, float(LEFT)
    for line in lines:
        width = 6.2 * len(line.label) + 26
        if x > LEFT and x + width > WIDTH:
            row, x = row + 1, float(LEFT)
        keys.append((row, x, line))
        x += width
    return keys


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _number(value: float, digits: int = 2) -> str:
    """Return a number with at least as many digits as are given."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{max(digits, 4)}g}"
