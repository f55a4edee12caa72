"""What a report draws: curves of a run in words and units, its phases, and samples before and after."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.analysis.report.chart import Line, chart

__all__ = ["RunFiles", "evaluation_rows", "metric_words", "panels", "phases", "read_run", "sample_pairs"]

PANELS = (
    (r"(?:(\w+)/)?reward/mean", "Reward", "reward per completion"),
    (r"kl/mean", "KL divergence from the reference", "nats per token"),
    (r"(?:(\w+)/)?completion/length", "Length of completions", "tokens"),
    (r"(?:(\w+)/)?completion/truncated", "Completions that were cut", "share, 0 to 1"),
    (r"(?:(\w+)/)?completion/entropy", "Entropy of the policy", "nats per token"),
    (r"(\w+)/accuracy", "Pairs ranked as labeled", "share, 0 to 1"),
    (r"(\w+)/margin", "Margin of the chosen completion", "reward"),
    (r"loss/(\w+)", "Loss", "loss"),
    (r"grad_norm/(\w+)", "Gradient norm before clipping", "norm"),
    (r"(\w+)/clip_fraction", "Tokens whose ratio was clipped", "share, 0 to 1"),
    (r"lr/(\w+)", "Learning rate", "rate"),
    (r"speed/tokens", "Speed", "tokens per second"),
)
"""Curves of training: pattern of the metric (a group names the curve), title, and unit."""

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
    """What a run left in its folder."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    """lines of metrics.jsonl"""
    evaluations: Sequence[Mapping[str, Any]]
    """lines of evaluation-metrics.jsonl"""
    samples: Sequence[Mapping[str, Any]]
    """lines of evaluations.jsonl"""
    config: str
    """config.toml"""


def read_run(folder: Path) -> RunFiles:
    """Return the files of a run; those that are not there are empty, and damaged lines are left out."""
    names = ("metrics.jsonl", "evaluation-metrics.jsonl", "evaluations.jsonl")
    config = folder / "config.toml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    metrics, evaluations, samples = ([*_lines(folder / name)] for name in names)
    return RunFiles(folder, metrics, evaluations, samples, text)


def panels(run: RunFiles) -> Iterator[str]:
    """Yield a chart for every group of metrics that changes, of training and of evaluations."""
    names = dict.fromkeys(name for row in run.rows for name in row)
    for pattern, title, unit in PANELS:
        found = [(name, match) for name in names if (match := re.fullmatch(pattern, name))]
        lines = []
        for number, (name, match) in enumerate(found):
            points = [(float(row["step"]), float(row[name])) for row in run.rows if _is_number(row.get(name))]
            if any(y for _, y in points):
                label = match[1] if match.groups() and match[1] else ("policy" if len(found) > 1 else title)
                lines.append(_line(label, points, number))
        if lines and any(len(line.x) > 1 for line in lines):
            yield chart(title, "step", unit, lines)
    for name, measured in _evaluation_points(run.evaluations).items():
        if len(measured) > 1:
            yield chart(f"Held out: {metric_words(name)}", "step", "mean ± standard error", [_error_line(measured)])


def evaluation_rows(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Return name, first value, last value and difference of every evaluation metric, as text."""
    rows = []
    for name, points in _evaluation_points(run.evaluations).items():
        (_, first, first_se), (_, last, last_se) = points[0], points[-1]
        errors = [f" ± {error:.3f}" if error else "" for error in (first_se, last_se)]
        rows.append((metric_words(name), f"{first:.3f}{errors[0]}", f"{last:.3f}{errors[1]}", f"{last - first:+.3f}"))
    return rows


def phases(run: RunFiles) -> list[tuple[str, float]]:
    """Return the phases of the steps with their seconds over the run, the longest first."""
    total = {words: sum(float(row.get(f"time/{name}", 0)) for row in run.rows) for name, words in PHASES.items()}
    rest = sum(float(row.get("time/step", 0)) for row in run.rows) - sum(total.values())
    return sorted(
        ((name, value) for name, value in {**total, "other": max(0.0, rest)}.items() if value), key=lambda p: -p[1]
    )


def sample_pairs(run: RunFiles) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Return every prompt that was answered at the first and at the last evaluation, with both answers."""
    steps = [row["step"] for row in run.samples if "step" in row]
    if not steps or min(steps) == max(steps):
        return []
    first, last = (
        {row.get("prompt"): row for row in run.samples if row.get("step") == s} for s in (min(steps), max(steps))
    )
    shared = [prompt for prompt in first if prompt in last]
    return [(str(first[prompt].get("question", prompt)), first[prompt], last[prompt]) for prompt in shared]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines."""
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _evaluation_points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (step, value, standard error or 0) of every metric of evaluations."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and not name.endswith("_se") and _is_number(value):
                found.setdefault(name, []).append(
                    (float(row["step"]), float(value), float(row.get(f"{name}_se") or 0.0))
                )
    return found


def _line(label: str, points: Sequence[tuple[float, float]], color: int) -> Line:
    return Line(label, [x for x, _ in points], [y for _, y in points], color=color)


def _error_line(points: Sequence[tuple[float, float, float]]) -> Line:
    """Return a line with a band of one standard error."""
    x, y = [x for x, _, _ in points], [y for _, y, _ in points]
    return Line("", x, y, [y - e for _, y, e in points], [y + e for _, y, e in points])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metric_words(name: str) -> str:
    """Return the name of a metric in words."""
    known = {
        "reward/mean": "reward per completion",
        "kl/mean": "KL divergence from the reference, nats per token",
        "completion/length": "length of completions, tokens",
        "return": "return (reward less the KL penalty)",
        "heldout/reward": "reward",
        "heldout/length": "length, tokens",
        "heldout/truncated": "share of completions cut",
        "heldout/loss": "loss",
        "heldout/perplexity": "perplexity",
        "bad/logprob": "log P(bad output), nats",
    }
    bare = name.removeprefix("eval/")
    return known.get(bare, bare.removeprefix("heldout/").replace("_", " "))
