"""The numbers that runs leave in their folders: lines of metrics, evaluations with errors, and values of groups of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.analysis.style import thin

__all__ = ["Points", "evaluation_points", "is_number", "json_lines", "read_groups"]

LINES = 2000
"""Lines of a file that are read; of more, so many at even distances, so that the longest run is read in a second."""

TRAINING = ("reward/mean", "kl/mean", "completion/length")
"""Metrics of training that are drawn and compared, in addition to all evaluations."""

Points = dict[str, dict[float, list[float]]]
"""Values over seeds by group and step."""


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines that name a step; damaged ones are left out."""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.is_file() else []
    for k in thin(len(lines), LINES):
        try:
            row = json.loads(lines[k])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def evaluation_points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (step, value, standard error or 0) of every metric of evaluations."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not name.endswith("_se") and is_number(value):
                found.setdefault(name, []).append(
                    (float(row["step"]), float(value), float(row.get(f"{name}_se") or 0.0))
                )
    return found


def read_groups(groups: Mapping[str, Sequence[Path]]) -> dict[str, Points]:
    """Return the values of every metric that is compared: by name, group and step, one per run."""
    metrics: dict[str, Points] = {}
    for key, folders in groups.items():
        for folder in folders:
            rows = json_lines(folder / "metrics.jsonl")
            found = [(name, float(row["step"]), float(row[name])) for row in rows for name in TRAINING if name in row]
            evaluations = evaluation_points([*json_lines(folder / "evaluation-metrics.jsonl")])
            found += [(name, step, value) for name, points in evaluations.items() for step, value, _ in points]
            for name, step, value in found:
                metrics.setdefault(name, {}).setdefault(key, {}).setdefault(step, []).append(value)
    return metrics


def is_number(value: Any) -> bool:
    """Return True for a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
