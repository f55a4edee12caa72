"""Figures and their tables. matplotlib is optional, opens no window, and the same numbers give the same file."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.analysis.style import COLORS, FEW, smooth, thin
from rlhf_core.analysis.sweep import SweepFile, read_sweep
from rlhf_core.analysis.tables import write_csv
from rlhf_core.contract.commands import Command
from rlhf_core.errors import MissingPackage, UsageError, run_option
from rlhf_core.util.places import check_writable, read_path

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Drawing", "check_matplotlib", "check_own", "draw_curve", "figure"]


POINTS = 60
"""Points of a curve that a file holds."""

MAKER = "rlhf-run"
"""Mark of our figures in their metadata; a figure without it is not overwritten."""


@dataclass(frozen=True)
class Drawing(Command, ABC):
    """A command that makes a figure of a sweep's runs, and the table of its numbers."""

    file: str
    """the sweep's TOML file"""
    _: KW_ONLY
    output: str
    """name of the files, without an ending"""
    formats: tuple[Literal["png", "svg", "pdf"], ...] = ("svg",)
    """file formats of the figure; none writes the table alone"""

    @abstractmethod
    def rows(self, sweep: SweepFile) -> list[dict[str, Any]]:
        """The table."""

    @abstractmethod
    def draw(self, rows: list[dict[str, Any]], stem: Path) -> None:
        """The figure."""

    def __call__(self, context: CommandContext) -> int:
        if self.formats:
            check_matplotlib()
        rows, stem = self.rows(read_sweep(self.file)), read_path(run_option("output"), self.output)
        check_writable(run_option("output"), stem)
        for ending in ("csv", *self.formats):
            check_own(stem.with_name(f"{stem.name}.{ending}"), list(rows[0]) if ending == "csv" else [])
        write_csv(stem.with_name(f"{stem.name}.csv"), rows)
        if self.formats:
            self.draw(rows, stem)
        print(", ".join(f"{stem}.{ending}" for ending in ("csv", *self.formats)))
        return 0


def check_own(path: Path, columns: list[str]) -> None:
    """Check that a file to be written is not there, or was written by such a command.

    Args:
        path: the file.
        columns: those of a table, whose first and last are the same for every choice of metrics; empty for a figure, which
            names its maker.

    Raises:
        UsageError: it is something else.
    """
    try:
        if not os.path.lexists(path) or (not path.is_symlink() and _is_own(path.read_bytes(), columns)):
            return
    except OSError:
        pass
    raise UsageError(
        f"{path} exists and is not a figure or table of this command; move it away, or name another "
        f"{run_option('output')}"
    )


def _is_own(content: bytes, columns: list[str]) -> bool:
    header = content.partition(b"\n")[0].decode(errors="replace").strip().split(",")
    return (header[0], header[-1]) == (columns[0], columns[-1]) if columns else MAKER.encode() in content


def check_matplotlib() -> None:
    """Say how to install it before anything is computed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPackage("figures need matplotlib: python3 -m pip install 'rlhf-core[plot]'") from None


@contextmanager
def figure(stem: Path, formats: Sequence[str], panels: int = 1, caption: str = "") -> Iterator[list[Any]]:
    """Axes side by side; written as `stem.<format>` when the block ends.

    Args:
        stem: the file's name without an ending.
        formats: endings.
        panels: number of axes.
        caption: small line under them, such as the name of the intervals.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.2 * panels, 3.9), layout="constrained", dpi=110)
    FigureCanvasAgg(drawn)
    axes = list(drawn.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.set_prop_cycle(color=list(COLORS))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    yield axes
    if caption:
        drawn.supxlabel(caption, fontsize=8, color="0.4")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "rlhf", "svg.fonttype": "none"}):
        for each in formats:
            path = stem.with_name(f"{stem.name}.{each}")
            made = {"png": {"Software": MAKER}, "svg": {"Date": None, "Creator": MAKER}}
            drawn.savefig(path, metadata=made.get(each, {"CreationDate": None, "Creator": MAKER}))
            if each == "svg":
                path.write_text(_short(path.read_text(encoding="utf-8")), encoding="utf-8")


def draw_curve(
    axis: Any,
    label: str,
    x: Sequence[float],
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    color: int,
) -> None:
    """Draw a curve with its band: points with marks where they are few, else a moving mean over a faint raw line.

    Args:
        axis: of matplotlib.
        label: name in the legend.
        x: places of the points.
        mean: their values.
        low: lower ends of the intervals.
        high: upper ends.
        color: number in `COLORS`.
    """
    few = len(x) <= FEW
    shown = thin(len(x), POINTS)
    x, raw, even, below, above = (
        [values[k] for k in shown]
        for values in (x, mean, *(list(each) if few else smooth(each) for each in (mean, low, high)))
    )
    if any(a < b for a, b in zip(below, above, strict=True)):
        axis.fill_between(x, below, above, color=COLORS[color], alpha=0.15, linewidth=0)
    if not few:
        axis.plot(x, raw, color=COLORS[color], alpha=0.3, linewidth=0.8)
    axis.plot(x, even, color=COLORS[color], label=label, marker="o" if few else None, markersize=3, linewidth=1.6)


def _short(svg: str) -> str:
    """Return a drawing with its paths to a tenth of a point, in a third of its size."""

    def shorten(match: re.Match[str]) -> str:
        numbers = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", match[1])
        return f'{match[0][0]}d="{" ".join(numbers.split())}"'

    svg = re.sub(r'\sd="([^"]*)"', shorten, svg)
    return re.sub(r"\n +", "\n", re.sub(r"(\d\.\d\d)\d+", r"\1", svg))
