"""The parts of a report on several runs: groups of runs with intervals over seeds, and the iterations of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlhf_core.analysis.chart import Line, chart
from rlhf_core.analysis.report.page import table
from rlhf_core.analysis.report.panels import error_line
from rlhf_core.analysis.run_files import Points, evaluation_points, read_groups
from rlhf_core.analysis.stats import t_interval
from rlhf_core.analysis.style import colors_of, measure_of, method_name
from rlhf_core.analysis.sweep import SweepFile

__all__ = ["INTERVAL", "final_rows", "group_sections", "recipe_sections", "sweep_sections"]

INTERVAL = "mean ± 95 % t-interval over seeds"
"""Name of the interval of all numbers over seeds."""


def sweep_sections(sweep: SweepFile) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of the parts of a sweep's report."""
    groups: dict[str, list[Path]] = {}
    for member in sweep.members:
        groups.setdefault(member.method, []).append(member.folder)
    yield from group_sections({method: (method_name(method), folders) for method, folders in groups.items()})
    yield "Runs", table(("run", "state"), [(member.name, member.state) for member in sweep.members])


def group_sections(groups: Mapping[str, tuple[str, Sequence[Path]]]) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of the parts on groups of runs.

    Args:
        groups: name as read by people and folders of the runs, by the name that the group's color follows from.
    """
    metrics = read_groups({key: folders for key, (_, folders) in groups.items()})
    names = [name for name, _ in groups.values()]
    yield f"Final values, {INTERVAL}", table(("measure", *names), final_rows(metrics, list(groups)))
    colors = colors_of(groups)
    drawn = [
        chart(title, "training step", f"{unit}, mean", [
            _interval_line(groups[key][0], points[key], colors[key]) for key in groups if key in points
        ])
        for (title, unit), points in ((measure_of(name), points) for name, points in metrics.items())
        if any(len(steps) > 1 for steps in points.values())
    ]  # fmt: skip
    yield (
        "Curves, bands are 95 % t-intervals over seeds",
        "".join(drawn) and f'<div class="panels">{"".join(drawn)}</div>',
    )


def final_rows(metrics: Mapping[str, Points], groups: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a row for each metric: its words, and for each group the mean at its last step with the interval."""

    def final(points: Mapping[float, Sequence[float]] | None) -> str:
        if not points:
            return ""
        values = points[max(points)]
        mean, half = t_interval(values)
        return f"{mean:.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")

    return [
        (measure_of(name).label, *(final(points.get(group)) for group in groups)) for name, points in metrics.items()
    ]


def recipe_sections(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of the parts of a recipe's report: its metrics by iteration, and its steps."""
    steps, metrics = [], dict[str, dict[str, list[tuple[float, float, float]]]]()
    for record in sorted(folder.glob("steps/t*/step.json"), key=lambda path: _place(path.parent.name)):
        content = json.loads(record.read_bytes())
        iteration, ingredient = _place(record.parent.name)
        steps.append((record.parent.name, f"{content['seconds']:.0f} s"))
        for output in content["outputs"].values():
            if output["kind"] == "metrics":
                row = {"step": iteration, **json.loads((record.parent / output["path"]).read_bytes())}
                for name, points in evaluation_points([row]).items():
                    metrics.setdefault(ingredient, {}).setdefault(name, []).extend(points)
    drawn = []
    for ingredient, found in metrics.items():
        for name, points in found.items():
            title, unit = measure_of(name)
            error = "; bands: standard error" if any(error for *_, error in points) else ""
            if len(points) > 1:
                drawn.append(chart(f"{ingredient}: {title}", f"iteration{error}", unit, [error_line(points)]))
    yield "Metrics by iteration", "".join(drawn) and f'<div class="panels">{"".join(drawn)}</div>'
    yield "Steps", table(("step", "time"), steps)


def _interval_line(name: str, points: Mapping[float, Sequence[float]], color: int) -> Line:
    """Return the mean over seeds with its interval as a line."""
    found = [(step, *t_interval(values)) for step, values in sorted(points.items())]
    x, mean = [step for step, *_ in found], [mean for _, mean, _ in found]
    low, high = [mean - half for _, mean, half in found], [mean + half for _, mean, half in found]
    return Line(name, x, mean, low, high, color)


def _place(step: str) -> tuple[int, str]:
    """Return iteration and ingredient of a step by its name, such as `t1-dpo`."""
    match = re.fullmatch(r"t(\d+)-(.+)", step)
    return (int(match[1]), match[2]) if match else (0, step)
