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
    """Write curves, evaluations, samples, times and configuration of a run, a sweep or a recipe to one HTML page."""

    folder: str
    """OUTPUT of a run or of a recipe, or the TOML file of a sweep"""
    output: str = ""
    """file to write; `report.html` in the folder where empty"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.analysis.report.page import page

        source = Path(self.folder)
        title, sections, folder = _contents(source)
        if not any(html for _, html in sections):
            raise UsageError(
                f"{source} has nothing to report yet; name the OUTPUT of a run or recipe, or the file of a sweep"
            )
        path = Path(self.output or folder / "report.html")
        _check_own(path)
        write_text(path, page(title, sections))
        print(path)
        return 0


def _contents(source: Path) -> tuple[str, list[tuple[str, str]], Path]:
    """Return title and sections of the report, and the folder that it belongs to."""
    from rlhf_core.analysis.report.groups import recipe_sections, sweep_sections
    from rlhf_core.analysis.report.page import run_sections
    from rlhf_core.analysis.report.panels import read_run
    from rlhf_core.analysis.sweep import read_sweep

    if source.suffix == ".toml":
        sweep = read_sweep(source)
        return source.stem, list(sweep_sections(sweep)), sweep.output
    if (source / "steps").is_dir():
        return source.name, list(recipe_sections(source)), source
    run = read_run(source)
    return (
        f"{source.name}: {len(run.rows)} steps",
        list(run_sections(run)) if run.rows or run.evaluations else [],
        source,
    )


def _check_own(path: Path) -> None:
    """Check that a report is not written over something else.

    Raises:
        UsageError: it would be.
    """
    from rlhf_core.analysis.report.page import is_report

    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_report(path)):
        raise UsageError(f"{path} is there and no report; name another {run_option('output')}")
