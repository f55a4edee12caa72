"""`rlhf-run compare RUN RUN …`: runs side by side with intervals over seeds, and what differs in their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.analysis.configurations import Group
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Compare"]


@dataclass(frozen=True)
class Compare(Command):
    """Compare runs: final values and curves with 95 % t-intervals over seeds, and the options that differ."""

    runs: tuple[str, ...]
    """OUTPUT folders of runs; runs that differ only in their seed form one group"""
    _: KW_ONLY
    output: str = "compare.html"
    """page with tables and curves; empty prints the tables alone"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.analysis.configurations import group_runs
        from rlhf_core.analysis.report.groups import INTERVAL, final_rows, group_sections
        from rlhf_core.analysis.report.page import table
        from rlhf_core.analysis.report.writing import write_page
        from rlhf_core.analysis.run_files import read_groups

        groups = group_runs([Path(run) for run in self.runs])
        named = {group.name: group for group in groups}
        values = final_rows(read_groups({name: group.folders for name, group in named.items()}), list(named))
        if not values:
            raise UsageError(f"{', '.join(self.runs)}: no step or evaluation to compare yet; start the runs first")
        head = ("", *named)
        print(_lines([(INTERVAL, *(f"{name}, n={len(group.folders)}" for name, group in named.items())), *values]))
        changes = _changes(groups)
        print()
        print(
            _lines([("options that differ", *named), *changes])
            if changes
            else "the configurations differ only in seeds"
        )
        if self.output:
            sections = [
                *group_sections({group.key: (group.name, group.folders) for group in groups}),
                ("Differences between the configurations", table(head, changes)),
                ("Runs", table(("run", "group"), [(str(path), each.name) for each in groups for path in each.folders])),
            ]
            print(f"\n{write_page(Path(self.output), 'Comparison: ' + '; '.join(named), sections)}")
        return 0


def _changes(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Return a row for each option that differs: its path and its value in each group, empty where it has none."""
    from rlhf_core.analysis.configurations import differences

    trees = [group.options for group in groups]
    return [(name, *(str(tree[name]) if name in tree else "" for tree in trees)) for name in differences(trees)]


def _lines(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
