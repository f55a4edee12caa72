"""The ingredient `collect`: metrics of all iterations as one table, and a figure where matplotlib is installed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import ClassVar

from rlhf_core.analysis.figures import figure
from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import OptionError

__all__ = ["Collect"]


@dataclass(frozen=True)
class Collect(Ingredient):
    """Collect metrics of all iterations in a table, and plot some of them against the iteration."""

    metrics: tuple[str, ...] = ("reward",)
    """columns to plot; the bars are standard errors, where the table has a column `NAME_se`"""
    label: str = "reward"
    """title of the vertical axis, with its unit"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"table": "table"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"results": "table"}

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Write results.csv, and results.svg if matplotlib is installed.

        Raises:
            OptionError: the table has no such column.
        """
        table = context.inputs["table"].path
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for name in self.metrics:
            if rows and name not in rows[0]:
                raise OptionError("metrics", f"{name!r} is no column; the table has {', '.join(rows[0])}")
        results = context.folder / "results.csv"
        copyfile(table, results)
        if find_spec("matplotlib") is not None and self.metrics:
            self._draw(rows, context.folder / "results")
        return {"results": Artifact("table", results)}

    def _draw(self, rows: Sequence[Mapping[str, str]], stem: Path) -> None:
        """Plot the metrics with their errors."""
        with figure(stem, ("svg",)) as (axis,):
            for name in self.metrics:
                points = [(number, row) for number, row in enumerate(rows) if row[name]]
                errors = [float(row.get(f"{name}_se") or 0) for _, row in points]
                x, y = [number for number, _ in points], [float(row[name]) for _, row in points]
                axis.errorbar(x, y, yerr=errors, marker="o", markersize=3, capsize=2, label=name.replace("_", " "))
            axis.set_xlabel("iteration")
            axis.set_ylabel(self.label)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
