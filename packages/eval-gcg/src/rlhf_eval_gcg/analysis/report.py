"""`rlhf-run gcg-report FOLDER --compare FOLDER …`: attack success of several checkpoints, at any threshold.

Folders that differ in their ending `-seedN` alone are runs of one method: their attacks are pooled, and intervals are over
goals and over runs with their attack seeds. The first method is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_core import Command, OptionError, UsageError
from rlhf_core.analysis.figures import check_own
from rlhf_core.analysis.tables import write_csv
from rlhf_core.contract.ranges import at_least
from rlhf_eval_gcg.analysis.read import Group, group_evaluations, read_evaluations
from rlhf_eval_gcg.analysis.success import Estimate, bad_rates, crossed_interval, paired_difference, rate_table, success

if TYPE_CHECKING:
    from rlhf_core import CommandContext

__all__ = ["GCGReport", "report_rows"]

COLUMNS = (
    ("name", "model"),
    ("step", "step"),
    ("threshold", "threshold"),
    ("loss_start", "loss at start"),
    ("loss", "loss"),
    ("matched", "matched"),
    ("clean", "clean"),
    ("attacked", "attacked"),
    ("clean_any", "clean, any of {k}"),
    ("attacked_any", "attacked, any of {k}"),
    ("difference", "attacked, less the first"),
)
"""Columns of the printed table: key and title."""


@dataclass(frozen=True)
class GCGReport(Command):
    """Print how often attacks succeed, with 95 % intervals, and write the table and a figure."""

    folder: str
    """folder of a run, or of rlhf-run eval --output"""
    _: KW_ONLY
    compare: tuple[str, ...] = ()
    """further folders; those whose names differ only in their ending -seedN form one method"""
    thresholds: tuple[float, ...] = ()
    """thresholds: rewards strictly below are bad; empty takes the threshold of the evaluation"""
    k: int = 0
    """number of answers of which one must be bad, in any-of-k; 0 takes as many as were sampled"""
    steps: Literal["last", "all"] = "last"
    """evaluations of a run: only the one after its last step, or all"""
    output: str = ""
    """name of the output files, without an ending; empty writes none"""
    formats: tuple[Literal["png", "svg", "pdf"], ...] = ("svg",)
    """file formats of the figure; none writes the table alone"""
    seed: int = 0
    """seed of the bootstrap; the same seed gives the same intervals"""

    def __post_init__(self) -> None:
        at_least(0, self, "k", "seed")
        if any(map(isnan, self.thresholds)):
            raise OptionError("thresholds", "must be numbers, not nan, below which no reward is")

    def __call__(self, context: CommandContext) -> int:
        folders = (self.folder, *self.compare)
        found = [each for folder in folders for each in read_evaluations(Path(folder), self.steps)]
        groups = group_evaluations(found)
        rows = report_rows(groups, self.thresholds, self.k, self.seed)
        print(render_table(rows))
        if self.output:
            stem, flat = Path(self.output), [flat_row(row) for row in rows]
            for ending in ("csv", *self.formats):
                check_own(stem.with_name(f"{stem.name}.{ending}"), list(flat[0]) if ending == "csv" else [])
            write_csv(stem.with_name(f"{stem.name}.csv"), flat)
            if self.formats:
                from rlhf_eval_gcg.analysis.drawing import draw

                draw(groups, stem, self.formats)
        return 0


def report_rows(
    groups: Sequence[Group], thresholds: Sequence[float], k: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Return a row per group and threshold.

    Raises:
        UsageError: no threshold was given, and the evaluations have none.
        OptionError: fewer than `k` answers were sampled.
    """
    return [
        _row(group, threshold, k, seed, groups[0]) for group in groups for threshold in thresholds or _thresholds(group)
    ]


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    k = max(int(row["k"]) for row in rows)
    lines = [[title.format(k=k) for _, title in COLUMNS], ["---"] * len(COLUMNS)]
    lines += [[_cell(row[key]) for key, _ in COLUMNS] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def flat_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with each estimate as three numbers."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Estimate):
            flat |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
        else:
            flat[key] = value
    return flat


def _thresholds(group: Group) -> list[float]:
    found = {evaluation.settings.get("threshold") for evaluation in group.evaluations}
    if None in found:
        raise UsageError(f"the evaluation in {group.name} has no threshold; pass --thresholds, such as --thresholds -5")
    return sorted(float(value) for value in found if value is not None)


def _row(group: Group, threshold: float, k: int, seed: int, first: Group) -> dict[str, Any]:
    attacks = group.attacks
    loss_GS, start_GS = (
        rate_table({(row["goal"], row["seed"]): float(row[key]) for row in attacks}) for key in ("loss", "initial_loss")
    )
    attacked, clean = (success(group.answers(each), threshold, k, seed=seed) for each in (True, False))
    if attacked is None:
        raise UsageError(
            f"the judge of {group.name} abstained from all answers to attacked prompts; choose another judge"
        )
    if attacked.any.value != attacked.any.value:
        raise OptionError("k", f"must be at most the number of answers that were sampled and judged, not {k}")
    own, others = (bad_rates(each.answers(True), threshold) for each in (group, first))
    return {
        "name": group.name,
        "step": group.step,
        "runs": len(group.evaluations),
        "goals": attacked.goals,
        "seeds": attacked.seeds,
        "answers": attacked.answers,
        "threshold": threshold,
        "k": attacked.k,
        "loss_start": float(np.nanmean(start_GS)),
        "loss": crossed_interval(loss_GS, seed=seed),
        "matched": sum(map(bool, (row["matched"] for row in attacks))) / len(attacks),
        "flops": sum(row["flops"][-1] for row in attacks if row["flops"]) / len(attacks),
        "clean": clean.mean if clean else nan,
        "attacked": attacked.mean,
        "clean_any": clean.any if clean else nan,
        "attacked_any": attacked.any,
        "difference": paired_difference(own, others, seed=seed) if group is not first else Estimate(0.0, 0.0, 0.0),
    }


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
