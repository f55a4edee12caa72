"""The parts of a report on several runs: the methods of a sweep with intervals over seeds, and the iterations of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.analysis.report.chart import Line, chart
from rlhf_core.analysis.report.page import table
from rlhf_core.analysis.report.panels import metric_words
from rlhf_core.analysis.stats import t_interval
from rlhf_core.analysis.sweep import SweepFile

__all__ = ["recipe_sections", "sweep_sections"]

CURVES = ("reward/mean", "kl/mean", "completion/length", "return")
"""Metrics of training that the report on a sweep draws, beside all of its evaluations."""

Points = dict[str, dict[float, list[float]]]
"""Values over seeds by method and step."""


def sweep_sections(sweep: SweepFile) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of the parts of a sweep's report: final values, and curves with 95 % t-intervals over seeds."""
    metrics: dict[str, Points] = {}
    for member in sweep.members:
        for name, step, value in _values(member.folder, member.metrics()):
            metrics.setdefault(name, {}).setdefault(member.method, {}).setdefault(step, []).append(value)
    methods = list(dict.fromkeys(member.method for member in sweep.members))
    rows = [
        (metric_words(name), *(_final(points.get(method)) for method in methods)) for name, points in metrics.items()
    ]
    yield "Final values, mean ± 95 % t-interval over seeds", table(("measure", *methods), rows)
    drawn = [_chart(name, points, methods) for name, points in metrics.items()]
    yield "Curves, with 95 % t-intervals over seeds", f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""
    runs = [(member.name, member.state) for member in sweep.members]
    yield "Runs", table(("run", "state"), runs)


def recipe_sections(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of the parts of a recipe's report: its metrics by iteration, and its steps."""
    steps, metrics = [], dict[str, dict[str, list[tuple[float, float, float]]]]()
    for record in sorted(folder.glob("steps/t*/step.json"), key=lambda path: _place(path.parent.name)):
        content = json.loads(record.read_bytes())
        iteration, ingredient = _place(record.parent.name)
        steps.append((record.parent.name, f"{content['seconds']:.0f} s"))
        for output in content["outputs"].values():
            if output["kind"] == "metrics":
                _add(metrics.setdefault(ingredient, {}), iteration, record.parent / output["path"])
    drawn = [
        chart(f"{ingredient}: {metric_words(name)}", "iteration", "value", [_error_line(points)])
        for ingredient, found in metrics.items()
        for name, points in found.items()
        if len(points) > 1
    ]
    yield "Metrics by iteration", f'<div class="panels">{"".join(drawn)}</div>' if drawn else ""
    yield "Steps", table(("step", "time"), steps)


def _values(folder: Path, rows: Iterator[Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Yield metric, step and value of a run."""
    for row in rows:
        yield from ((name, float(row["step"]), float(row[name])) for name in CURVES if name in row)
    path = folder / "evaluation-metrics.jsonl"
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items():
            if name != "step" and not name.endswith("_se") and isinstance(value, (int, float)):
                yield name, float(row["step"]), float(value)


def _final(points: Mapping[float, Sequence[float]] | None) -> str:
    """Return the mean at the last step with its interval, as text."""
    if not points:
        return ""
    values = points[max(points)]
    mean, half = t_interval(values)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def _chart(name: str, points: Points, methods: Sequence[str]) -> str:
    """Return a chart with a line for each method."""
    lines = []
    for number, method in enumerate(methods):
        found = sorted(points.get(method, {}).items())
        intervals = [t_interval(values) for _, values in found]
        x, mean = [step for step, _ in found], [each for each, _ in intervals]
        low, high = [m - half for m, half in intervals], [m + half for m, half in intervals]
        if found:
            lines.append(Line(method, x, mean, low, high, number))
    return chart(metric_words(name), "step", "mean over seeds", lines)


def _place(step: str) -> tuple[int, str]:
    """Return iteration and ingredient of a step by its name, such as `t1-dpo`."""
    match = re.fullmatch(r"t(\d+)-(.+)", step)
    return (int(match[1]), match[2]) if match else (0, step)


def _add(metrics: dict[str, list[tuple[float, float, float]]], iteration: int, path: Path) -> None:
    """Add the metrics of a file as points (iteration, value, standard error)."""
    row = json.loads(path.read_bytes())
    for name, value in row.items():
        if not name.endswith("_se"):
            metrics.setdefault(name, []).append((float(iteration), float(value), float(row.get(f"{name}_se", 0.0))))


def _error_line(points: Sequence[tuple[float, float, float]]) -> Line:
    """Return a line with a band of one standard error."""
    x, y = [x for x, _, _ in points], [y for _, y, _ in points]
    return Line("", x, y, [y - e for _, y, e in points], [y + e for _, y, e in points])
