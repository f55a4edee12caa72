"""Rotate checkpoints: keep the newest, the best by a named metric, and others by number and total size.

The best is chosen anew each time from the metrics in the checkpoints, so that a run killed anywhere between saving,
measuring and removing makes up for it the next time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_core.checkpoint.manifest import step_number
from rlhf_core.checkpoint.own_files import own_checkpoints
from rlhf_core.errors import OptionError
from rlhf_core.util.atomic_files import discard, write_text
from rlhf_core.util.messages import log
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["Rotation", "check_metric", "read_best", "which_is_better"]

LOW = ("loss", "nll", "perplexity")
"""Metrics, by a part of their names, whose low values are good."""


def which_is_better(name: str, mode: Literal["auto", "max", "min"]) -> Literal["max", "min"]:
    """Return the mode that `--keep-best-mode` means for a metric."""
    if mode != "auto":
        return mode
    return "min" if any(part in LOW for part in name.split("/")) else "max"


@dataclass(frozen=True)
class Rotation:
    """Limits on the checkpoints that a run keeps."""

    keep: int
    """number of checkpoints, the best not counted"""
    gigabytes: float = 0.0
    """total size in units of 10^9 bytes; 0 means no limit"""
    metric: str = ""
    """metric that chooses the best checkpoint; empty keeps no best one"""
    mode: Literal["max", "min"] = "max"
    """direction of good values: high or low"""
    measured: Mapping[int, float] | None = None
    """values of the metric, by step, that were measured after the checkpoint was written"""

    def __call__(self, output: Path) -> None:
        """Mark the best checkpoint in `best.json`, and remove what is not kept."""
        newest_first = own_checkpoints(output)[::-1]
        kept = set(newest_first[:1]) | self._mark_best(output / "checkpoints" / "best.json", newest_first)
        size = sum(map(_bytes, kept))
        for folder in newest_first[1 : self.keep]:
            size += 0 if folder in kept else _bytes(folder)
            if self.gigabytes and size > self.gigabytes * 1e9:
                break
            kept.add(folder)
        for folder in reversed(newest_first):
            if folder not in kept:
                discard(folder)

    def _mark_best(self, marker: Path, newest_first: Iterable[Path]) -> set[Path]:
        """The best checkpoint, if there is one: written down, so that people and tools find it. Of equals the newest."""
        values = {folder: value for folder in newest_first if (value := self._value(folder)) is not None}
        if not values:
            marker.unlink(missing_ok=True)
            return set()
        best = (max if self.mode == "max" else min)(values, key=values.__getitem__)
        found = {"checkpoint": best.name, "metric": self.metric, "mode": self.mode, "value": values[best]}
        content = json.dumps(found, indent=1) + "\n"
        if not marker.exists() or marker.read_bytes() != content.encode():
            write_text(marker, content)
        return {best}

    def _value(self, folder: Path) -> float | None:
        """The metric of a checkpoint; None where it was not measured, is not a number, or the file is damaged."""
        step = step_number(folder)
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            value = (self.measured or {}).get(step, state["metrics"].get(self.metric))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return value if isinstance(value, (int, float)) and value == value else None


def read_best(output: Path) -> Path | None:
    """Return the checkpoint that `best.json` names; None, with a warning if it is damaged, if there is none."""
    marker = output / "checkpoints" / "best.json"
    if not marker.is_file():
        return None
    try:
        name: Any = json.loads(marker.read_bytes())["checkpoint"]
        best = next(folder for folder in own_checkpoints(output) if folder.name == name)
    except (ValueError, KeyError, TypeError, StopIteration):
        log.warning(f"{marker} is damaged; the model of the best checkpoint is not written")
        return None
    return best


def check_metric(name: str, trained: Iterable[str], metrics: Mapping[str, float], evaluated: Iterable[str]) -> None:
    """Check that `--keep-best` names a measured metric: in a step, or by an evaluator.

    A step that leaves an update out, or in which a role rests, proves nothing; nor does one without a row of some datasource.

    Args:
        name: the metric that `--keep-best` names; nothing is checked where it is empty.
        trained: names of the trained roles.
        metrics: those of a finished step.
        evaluated: names of the metrics of the last evaluation.

    Raises:
        UsageError: it does not.
    """
    known = {*metrics, *evaluated}
    partial = any(f"loss/{role}" not in metrics for role in trained)
    if name and not partial and not {name, name.rpartition("/")[0]} & known:
        raise OptionError(
            "/keep_best",
            f"{name}: no such metric{did_you_mean(name, known)}; metrics.jsonl lists the metrics of the run",
        )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
