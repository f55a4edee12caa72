"""`rlhf-run frontier FILE`: what the methods of a sweep trade: how bad and how rare the worst outputs are, against return.

Reads the table of held-out samples that each run left (`--evaluator heldout_table`); thresholds are applied here, not when
sampling. A point is a method: means over its seeds, with bootstrap intervals of both numbers, seeds drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_core.analysis.figures import Drawing, figure
from rlhf_core.analysis.stats import bootstrap_interval, cvar, pareto, share_below
from rlhf_core.analysis.sweep import Member, SweepFile
from rlhf_core.analysis.tables import read_columns
from rlhf_core.errors import UsageError

__all__ = ["Frontier", "frontier_rows"]


@dataclass(frozen=True)
class Frontier(Drawing):
    """Draw bad outputs, CVaR or attack success against return for a sweep's methods, and mark the Pareto set."""

    _: KW_ONLY
    y: Literal["bad", "cvar", "attack"] = "bad"
    """share of rewards strictly below the threshold; mean of the worst rewards; or share of samples whose column
    `attack_success` is true"""
    threshold: float = -5.0
    """rewards below it are bad"""
    share: float = 1e-4
    """share of the rewards that CVaR is the mean of, the lowest; at least one"""
    x: Literal["return", "reward"] = "return"
    """what it costs: the mean of this column"""
    table: str = "heldout.parquet"
    """the table in each run's folder, Parquet or JSON lines"""
    output: str = "frontier"
    """name of the files, without an ending"""
    seed: int = 0
    """of the bootstrap; the same seed gives the same intervals"""

    def rows(self, sweep: SweepFile) -> list[dict[str, Any]]:
        """A row per method, of its finished runs."""
        members = [member for member in sweep.members if member.state == "finished"]
        if not members:
            raise UsageError(f"no run of {self.file} is finished; see rlhf-run sweep {self.file} --status")
        results: dict[str, list[tuple[float, float]]] = {}
        for member in members:
            results.setdefault(member.method, []).append(self._point(member))
        return frontier_rows(results, self.x, self.y, higher=self.y == "cvar", seed=self.seed)

    def _point(self, member: Member) -> tuple[float, float]:
        """(x, y) of one run."""
        y = "attack_success" if self.y == "attack" else "reward"
        columns = read_columns(member.folder / self.table, sorted({self.x, y}))
        measure: dict[str, Callable[[list[Any]], float]] = {
            "bad": lambda rewards: share_below(rewards, self.threshold),
            "cvar": lambda rewards: cvar(rewards, self.share),
            "attack": lambda successes: sum(map(bool, successes)) / len(successes),
        }
        return sum(columns[self.x]) / len(columns[self.x]), measure[self.y](columns[y])

    def draw(self, rows: list[dict[str, Any]], stem: Path) -> None:
        """A point with its intervals per method, and a line through the Pareto set."""
        with figure(stem, self.formats) as (axis,):
            for k, row in enumerate(rows):
                bars = [
                    [[max(0.0, row[n] - row[f"{n}_low"])], [max(0.0, row[f"{n}_high"] - row[n])]]
                    for n in (self.x, self.y)
                ]
                axis.errorbar(
                    row[self.x], row[self.y], xerr=bars[0], yerr=bars[1], color=f"C{k}", capsize=2, label=row["method"],
                    marker="o" if row["pareto"] else "x",
                )  # fmt: skip
            best = sorted((row[self.x], row[self.y]) for row in rows if row["pareto"])
            axis.plot(*zip(*best, strict=True), color="0.6", linewidth=1, zorder=0, label="Pareto set")
            axis.set_xlabel(f"mean {self.x}")
            names = {
                "bad": f"P(reward < {self.threshold:g})",
                "cvar": f"CVaR {self.share:g}",
                "attack": "attack success",
            }
            axis.set_ylabel(names[self.y])
            axis.legend()


def frontier_rows(
    results: dict[str, list[tuple[float, float]]], x: str, y: str, higher: bool, seed: int = 0
) -> list[dict[str, Any]]:
    """A row a method from the (x, y) of its seeds; `higher` says which way y is good. x is good when it is high."""
    rows: list[dict[str, Any]] = []
    for method, points in results.items():
        row: dict[str, Any] = {"method": method, "seeds": len(points)}
        for k, name in enumerate((x, y)):
            values = [point[k] for point in points]
            low, high = bootstrap_interval(values, seed + k)
            row |= {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    kept = pareto([(row[x], row[y] if higher else -row[y]) for row in rows])
    return [{**row, "pareto": best} for row, best in zip(rows, kept, strict=True)]
