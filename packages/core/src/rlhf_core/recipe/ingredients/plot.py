"""The ingredient `plot`: a figure of a table, such as the metrics of all iterations."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rlhf_core.analysis.figures import check_matplotlib, figure
from rlhf_core.contract.ingredients import Artifact, ArtifactKind, Ingredient, IngredientContext
from rlhf_core.errors import DataError, OptionError

__all__ = ["Plot", "draw_metrics", "read_table"]


@dataclass(frozen=True)
class Plot(Ingredient):
    """Draw columns of a table against another one. Vertical bars are standard errors, from the columns `NAME_se`."""

    metrics: tuple[str, ...]
    """columns to draw"""
    label: str
    """title of the vertical axis, with its unit"""
    names: tuple[str, ...] = ()
    """name of each column in the legend, in the same order; none takes the columns' own"""
    x: str = "version"
    """column of the horizontal axis; `version` counts the rows of `NAME@all` from 0"""
    x_label: str = "iteration"
    """title of the horizontal axis, with its unit"""

    inputs: ClassVar[Mapping[str, ArtifactKind]] = {"table": "table"}
    outputs: ClassVar[Mapping[str, ArtifactKind]] = {"figure": "figure"}

    def __post_init__(self) -> None:
        if not self.metrics:
            raise OptionError("metrics", "must name at least one column")
        if self.names and len(self.names) != len(self.metrics):
            raise OptionError(
                "names", f"must have one name for each of the {len(self.metrics)} metrics, not {len(self.names)} names"
            )

    def check(self) -> None:
        """Check that matplotlib is installed.

        Raises:
            MissingPackage: it is not.
        """
        check_matplotlib()

    def __call__(self, context: IngredientContext) -> Mapping[str, Artifact]:
        """Draw it.

        Raises:
            OptionError: the table has no such column.
            DataError: a cell is no number.
        """
        rows = read_table(context.inputs["table"].path, (self.x, *self.metrics))
        names = dict(zip(self.metrics, self.names or self.metrics, strict=True))
        draw_metrics(rows, names, context.folder / "figure", self.label, (self.x, self.x_label))
        return {"figure": Artifact("figure", context.folder / "figure.svg")}


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file as texts by column.

    Raises:
        OptionError: it lacks one of `columns`.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in columns:
        if rows and name not in rows[0]:
            raise OptionError("metrics", f"{name!r} is not a column; the table has {', '.join(rows[0])}")
    return rows


def draw_metrics(
    rows: Sequence[Mapping[str, str]], names: Mapping[str, str], stem: Path, label: str, x: tuple[str, str]
) -> None:
    """Draw columns of a table with their standard errors to `stem`.svg; an empty cell is no point.

    Args:
        rows: the table.
        names: the columns, and how the legend calls each.
        stem: path of the figure without its ending.
        label: title of the vertical axis.
        x: column and title of the horizontal axis.

    Raises:
        DataError: a cell is no number.
    """
    with figure(stem, ("svg",)) as (axis,):
        for column, name in names.items():
            points = [row for row in rows if row[column] and row[x[0]]]
            place, value = ([_number(row, each) for row in points] for each in (x[0], column))
            errors = [_number(row, f"{column}_se") if row.get(f"{column}_se") else 0.0 for row in points]
            axis.errorbar(place, value, yerr=errors, marker="o", markersize=3, capsize=2, label=name)
        axis.set_xlabel(x[1])
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(
            integer=all(_number(row, x[0]).is_integer() for row in rows if row[x[0]])
        )
        axis.legend()


def _number(row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise DataError(f"the column {column!r} of the table contains {row[column]!r}, which is not a number") from None
