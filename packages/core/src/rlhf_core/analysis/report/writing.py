"""Writes the report of a run, a sweep or a recipe, when it ends or on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_core.analysis.report.groups import recipe_sections, sweep_sections
from rlhf_core.analysis.report.page import is_report, page, run_sections
from rlhf_core.analysis.report.panels import read_run
from rlhf_core.analysis.sweep import read_sweep
from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.messages import log, progress

__all__ = ["report_at_end", "write_page", "write_report"]


def write_report(source: Path, path: Path | None = None) -> Path:
    """Write the report of a run's or recipe's folder, or of a sweep's TOML file; return the file.

    Raises:
        UsageError: there is nothing to report, or something else is in the file's place.
    """
    if source.suffix == ".toml":
        sweep = read_sweep(source)
        title, sections, folder = source.stem, list(sweep_sections(sweep)), sweep.output
    elif (source / "steps").is_dir():
        title, sections, folder = source.name, list(recipe_sections(source)), source
    else:
        run = read_run(source)
        title = f"{source.name}: {max((row['step'] for row in run.rows), default=0)} steps"
        sections, folder = list(run_sections(run)) if run.rows or run.evaluations else [], source
    if not any(html for _, html in sections):
        raise UsageError(
            f"{str(source)!r} has nothing to report yet; name the OUTPUT of a run or recipe, or the file of a sweep"
        )
    return write_page(path or folder / "report.html", title, sections)


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> Path:
    """Write a page in place of an earlier one; return the file.

    Raises:
        UsageError: something else is there.
    """
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or not is_report(path)):
        raise UsageError(f"{path} exists and is not a report; name another {run_option('output')}")
    write_text(path, page(title, sections))
    return path


def report_at_end(source: Path) -> None:
    """Write the report of what has just ended, and name it; a failure is one warning, since the work itself is done."""
    try:
        progress.info(f"report in {write_report(source)}")
    except Exception as error:
        log.warning(f"the report of {source} could not be written: {type(error).__name__}: {error}")
