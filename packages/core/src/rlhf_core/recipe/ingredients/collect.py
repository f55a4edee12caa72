"""The ingredient `collect`: metrics of all iterations as one table, and a figure where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from shutil import copyfile
from typing import ClassVar

from rlhf_core.analysis.style import measure_of
from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.recipe.ingredients.plot import draw_metrics, read_table

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
        rows = [{**row, "iteration": str(number)} for number, row in enumerate(read_table(table, self.metrics))]
        results = context.folder / "results.csv"
        copyfile(table, results)
        if find_spec("matplotlib") is not None and self.metrics:
            names = {name: measure_of(name).title for name in self.metrics}
            draw_metrics(rows, names, context.folder / "results", self.label, ("iteration", "iteration"))
        return {"results": Artifact("table", results)}
