"""Line charts as inline SVG: axes and units in words, smoothed lines over faint raw ones, bands for intervals.

Colors are the classes `c0`, `c1`, … of the page, so that a chart follows the page's light or dark look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "chart", "round_ticks", "smooth"]

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 28, 40
"""Margins in pixels."""
TICKS = 5
"""Ticks of an axis, about."""
FEW = 16
"""Up to so many points are drawn as they are, each with a mark; more are smoothed."""
COLORS = 8
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

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>')
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{_number(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    at = f'x="12" y="{(TOP + HEIGHT - BOTTOM) / 2}" transform="rotate(-90 12 {(TOP + HEIGHT - BOTTOM) / 2})"'
    parts.append(f'<text class="label" {at} text-anchor="middle">{escape(y_label)}</text>')
    for line in lines:
        parts += _curve(line, place)
    if len(lines) > 1:
        parts += _legend(lines)
    return "".join([*parts, "</svg>"])


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Return the exponential moving mean of values, without the bias of its beginning."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
        means.append(total / mass)
    return means


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


def _curve(line: Line, place: object) -> list[str]:
    """Return the elements of a curve: its band, its raw and its smoothed points."""
    assert callable(place)
    color = f"c{line.color % COLORS}"
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    parts = []
    if line.low is not None and line.high is not None:
        upper = [place(x, y) for x, y in zip(line.x, line.high, strict=True) if math.isfinite(y)]
        lower = [place(x, y) for x, y in zip(line.x, line.low, strict=True) if math.isfinite(y)]
        parts.append(f'<polygon class="band {color}" points="{_points([*upper, *reversed(lower)])}"/>')
    raw = [place(x, y) for x, y in points]
    if len(points) <= FEW:
        parts.append(f'<polyline class="line {color}" points="{_points(raw)}"/>')
        parts += [f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in raw]
    else:
        even = [place(x, y) for (x, _), y in zip(points, smooth([y for _, y in points]), strict=True)]
        parts.append(f'<polyline class="line raw {color}" points="{_points(raw)}"/>')
        parts.append(f'<polyline class="line {color}" points="{_points(even)}"/>')
    hover = ";".join(
        f"{x:.1f},{y:.1f},{_number(px)},{_number(py)}" for (x, y), (px, py) in zip(raw, points, strict=True)
    )
    return [f'<g data-label="{escape(line.label)}" data-points="{hover}">', *parts, "</g>"]


def _legend(lines: Sequence[Line]) -> list[str]:
    """Return the names of the curves, right of the title."""
    parts: list[str] = []
    x: float = WIDTH - RIGHT
    for line in reversed(lines):
        x -= 7 * len(line.label) * 0.85 + 18
        parts.append(f'<rect class="key c{line.color % COLORS}" x="{x:.0f}" y="8" width="9" height="9"/>')
        parts.append(f'<text class="tick" x="{x + 12:.0f}" y="16">{escape(line.label)}</text>')
    return parts


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _number(value: float) -> str:
    """Return a number with as many digits as a reader needs."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"
