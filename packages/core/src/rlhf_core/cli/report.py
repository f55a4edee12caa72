"""`rlhf-run report OUTPUT`: one HTML page of a run, a sweep or a recipe, which needs no network."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.atomic_files import write_text

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Report"]


@dataclass(frozen=True)
class Report(Command):
    """Write a run's curves, evaluations, samples, times and configuration to one HTML page."""

    folder: str
    """OUTPUT of a run"""
    output: str = ""
    """file to write; OUTPUT/report.html where empty"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.analysis.report.page import page, run_sections
        from rlhf_core.analysis.report.panels import read_run

        folder = Path(self.folder)
        run = read_run(folder)
        if not run.rows and not run.evaluations:
            raise UsageError(f"{folder} has no metrics.jsonl with a step; name the OUTPUT folder of a run")
        path = Path(self.output or folder / "report.html")
        _check_own(path)
        write_text(path, page(f"{folder.name}: {len(run.rows)} steps", list(run_sections(run))))
        print(path)
        return 0


def _check_own(path: Path) -> None:
    """Check that a report is not written over something else.

    Raises:
        UsageError: it would be.
    """
    from rlhf_core.analysis.report.page import is_report

    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_report(path)):
        raise UsageError(f"{path} is there and no report; name another {run_option('output')}")
