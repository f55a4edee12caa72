"""`rlhf-run curves FILE`: metrics of a sweep's runs against samples or steps, a line a method, a band over its seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_core.analysis.figures import Drawing, draw_curve, figure
from rlhf_core.analysis.stats import t_interval
from rlhf_core.analysis.style import colors_of, measure_of, method_name
from rlhf_core.analysis.sweep import Member, SweepFile
from rlhf_core.errors import UsageError

__all__ = ["Curves", "series"]

INTERVAL = "bands: 95 % t-interval over seeds; bold: moving mean of the faint line"
"""Caption of the figure."""


@dataclass(frozen=True)
class Curves(Drawing):
    """Plot metrics of a sweep's runs: means over seeds with 95 % t-intervals, as a figure and a CSV table."""

    _: KW_ONLY
    metrics: tuple[str, ...] = ("reward/mean",)
    """names of metrics, as in metrics.jsonl; `return` is the reward less the KL penalty"""
    x: Literal["samples", "steps"] = "samples"
    """horizontal axis of the curves; `samples` counts those of all roles"""
    output: str = "curves"
    """name of the output files, without an ending"""
    seeds: int = 1
    """least number of seeds per point; points with fewer are left out"""

    def rows(self, sweep: SweepFile) -> list[dict[str, Any]]:
        """A row per metric, method and point."""
        points: dict[tuple[str, str, float], list[float]] = {}
        for member in sweep.members:
            for metric in self.metrics:
                for x, y in series(member, metric, self.x):
                    points.setdefault((metric, member.method, x), []).append(y)
        rows = []
        for (metric, method, x), values in points.items():
            if len(values) >= self.seeds:
                mean, half = t_interval(values)
                ends = {"low": mean - half, "high": mean + half, "seeds": len(values)}
                rows.append({"metric": metric, "method": method, self.x: x, "mean": mean, **ends})
        if not rows:
            raise UsageError(
                f"no run of {self.file} has {', '.join(self.metrics)} yet; see rlhf-run sweep {self.file} --status"
            )
        return sorted(rows, key=lambda row: (self.metrics.index(row["metric"]), row["method"], row[self.x]))

    def draw(self, rows: list[dict[str, Any]], stem: Path) -> None:
        """A panel per metric, a line and a band per method."""
        methods = list(dict.fromkeys(row["method"] for row in rows))
        colors = colors_of(methods)
        with figure(stem, self.formats, len(self.metrics), INTERVAL) as axes:
            for axis, metric in zip(axes, self.metrics, strict=True):
                title, unit = measure_of(metric)
                for method in methods:
                    line = [row for row in rows if (row["metric"], row["method"]) == (metric, method)]
                    if line:
                        x, mean, low, high = ([row[name] for row in line] for name in (self.x, "mean", "low", "high"))
                        draw_curve(axis, method_name(method), x, mean, low, high, colors[method])
                axis.set_title(title)
                axis.set_xlabel({"samples": "completions sampled, all roles", "steps": "training steps"}[self.x])
                axis.set_ylabel(unit)
            axes[0].legend(frameon=False)


def series(member: Member, metric: str, x: Literal["samples", "steps"]) -> Iterator[tuple[float, float]]:
    """(x, value) of one run; of a metric of evaluations also before the first step."""
    at = {0: 0.0}
    values: dict[int, float] = {}
    for row in member.metrics():
        step = int(row["step"])
        at[step] = at[max(at)] + float(row.get("samples", 0)) if x == "samples" else float(step)
        if (value := _value(row, metric)) is not None:
            values[step] = value
    for row in member.metrics("evaluation-metrics.jsonl"):
        if metric in row and row["step"] in at:
            values[int(row["step"])] = float(row[metric])
    return ((at[step], values[step]) for step in sorted(values))


def _value(row: Mapping[str, Any], metric: str) -> float | None:
    if metric == "return" and "reward/mean" in row:
        return float(row["reward/mean"]) - float(row.get("kl/coef", 0)) * float(row.get("kl/completion", 0))
    return float(row[metric]) if metric in row else None
