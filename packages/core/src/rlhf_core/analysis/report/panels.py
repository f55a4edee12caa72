"""Panels of a report: curves with words and units, phases, and samples before and after."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.analysis.chart import Line, chart
from rlhf_core.analysis.run_files import evaluation_points, is_number, json_lines
from rlhf_core.analysis.style import MEASURES, measure_of

__all__ = ["RunFiles", "error_line", "evaluation_rows", "panels", "phases", "read_run", "sample_pairs"]

SAMPLES = 6
"""Prompts whose answers are shown."""

PHASES = {
    "rollout": "sampling",
    "reward": "scoring",
    "needs": "log-probabilities",
    "credit": "advantages",
    "train": "training",
    "sync": "weight sync",
    "checkpoint": "checkpoints",
    "data": "data",
}
"""Parts of a step's time, `time/<name>`, in words."""


@dataclass(frozen=True)
class RunFiles:
    """Files in the folder of a run."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    """lines of metrics.jsonl"""
    evaluations: Sequence[Mapping[str, Any]]
    """lines of evaluation-metrics.jsonl"""
    samples: Sequence[Mapping[str, Any]]
    """lines of evaluations.jsonl"""
    config: str
    """config.toml"""
    about: Mapping[str, Any]
    """about.json: plan and versions"""


def read_run(folder: Path) -> RunFiles:
    """Return the files of a run; those that are not there are empty, and damaged lines are left out."""
    names = ("metrics.jsonl", "evaluation-metrics.jsonl", "evaluations.jsonl")
    config = folder / "config.toml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    try:
        about = json.loads((folder / "about.json").read_bytes())
    except (OSError, ValueError):  # of an older run, or damaged: the rest is worth a report
        about = {}
    metrics, evaluations, samples = ([*json_lines(folder / name)] for name in names)
    return RunFiles(folder, metrics, evaluations, samples, text, about if isinstance(about, dict) else {})


def panels(run: RunFiles) -> Iterator[str]:
    """Yield a chart for every group of metrics that changes, of training and of evaluations."""
    names = dict.fromkeys(name for row in run.rows for name in row)
    for pattern, title, unit in MEASURES:
        found = [(name, match) for name in names if (match := re.fullmatch(pattern, name))]
        lines = []
        for number, (name, match) in enumerate(found):
            points = [(float(row["step"]), float(row[name])) for row in run.rows if is_number(row.get(name))]
            if len({y for _, y in points}) > 1:
                label = match[1] if match.groups() and match[1] else ("policy" if len(found) > 1 else title)
                x, y = zip(*points, strict=True)
                lines.append(Line(label, x, y, color=number))
        if lines:
            yield chart(title, "training step", unit, lines)
    for name, measured in evaluation_points(run.evaluations).items():
        if len({value for _, value, _ in measured}) > 1:
            title, unit = measure_of(name)
            error = "; bands: standard error" if any(error for *_, error in measured) else ""
            yield chart(title, f"training step{error}", unit, [error_line(measured)])


def evaluation_rows(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Return name, first value, last value and difference of every evaluation metric, as text."""
    rows = []
    for name, points in evaluation_points(run.evaluations).items():
        (_, first, first_se), (_, last, last_se) = points[0], points[-1]
        errors = [f" ± {error:.3f}" if error else "" for error in (first_se, last_se)]
        rows.append(
            (measure_of(name).title, f"{first:.3f}{errors[0]}", f"{last:.3f}{errors[1]}", f"{last - first:+.3f}")
        )
    return rows


def phases(run: RunFiles) -> list[tuple[str, float]]:
    """Return the phases of the steps with their seconds over the run, the longest first."""
    whole = (max(row["step"] for row in run.rows) / len(run.rows)) if run.rows else 1.0  # of a long run some are read
    total = {words: sum(float(row.get(f"time/{name}", 0)) for row in run.rows) for name, words in PHASES.items()}
    rest = sum(float(row.get("time/step", 0)) for row in run.rows) - sum(total.values())
    parts = {**total, "other": max(0.0, rest)}
    return sorted(((name, whole * value) for name, value in parts.items() if value), key=lambda part: -part[1])


def sample_pairs(run: RunFiles) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Return every prompt that was answered at the first and at the last evaluation, with both answers."""
    steps = [row["step"] for row in run.samples if "step" in row]
    if not steps or min(steps) == max(steps):
        return []
    first, last = (
        {row.get("prompt"): row for row in run.samples if row.get("step") == s} for s in (min(steps), max(steps))
    )
    shared = [prompt for prompt in first if prompt in last]
    return [(str(first[each].get("question", each)), first[each], last[each]) for each in shared[:SAMPLES]]


def error_line(points: Sequence[tuple[float, float, float]]) -> Line:
    """Return a line with a band of one standard error."""
    x, y = [x for x, _, _ in points], [y for _, y, _ in points]
    return Line("", x, y, [y - e for _, y, e in points], [y + e for _, y, e in points])
