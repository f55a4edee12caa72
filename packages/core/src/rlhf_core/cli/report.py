"""`rlhf-run report OUTPUT`: one HTML page of a run, a sweep or a recipe, which needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.contract.commands import Command

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Report"]


@dataclass(frozen=True)
class Report(Command):
    """Write curves, evaluations, samples, times and configuration of a run, a sweep or a recipe to one HTML page."""

    folder: str
    """OUTPUT of a run or of a recipe, or the TOML file of a sweep"""
    output: str = ""
    """file to write; empty takes `report.html` in the folder"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.analysis.report.writing import write_report

        print(write_report(Path(self.folder), Path(self.output) if self.output else None))
        return 0
