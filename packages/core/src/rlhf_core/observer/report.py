"""The report that every run leaves: OUTPUT/report.html, written when the run has ended and named in its last line.

Content of a report that no other file holds is written to OUTPUT/about.json when the run starts: its plan, and versions.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import TYPE_CHECKING

from rlhf_core.analysis.report.writing import report_at_end
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import RunStopped
from rlhf_core.util.atomic_files import write_text

if TYPE_CHECKING:
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.run_view import RunView

__all__ = ["rlhf_run_end", "rlhf_run_start"]

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")
"""Distributions whose versions are written down, in addition to those of plugins."""


@hookimpl
def rlhf_run_start(run: RunView) -> None:
    """Write down the plan and the versions."""
    if run.config.report:
        about = {"plan": _plan_rows(run.plan), "versions": _versions(run)}
        write_text(run.output / "about.json", json.dumps(about, indent=1) + "\n")


@hookimpl(trylast=True)  # after the console has named the model
def rlhf_run_end(run: RunView, error: BaseException | None) -> None:
    """Write the report of a run that reached its end, or that an observer stopped; see `--report`."""
    something = run.step or run.evaluations  # `--steps 0` only writes the model
    if run.config.report and something and (error is None or isinstance(error, RunStopped)):
        report_at_end(run.output)


def _plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Return role, model and what trains it, for each role."""
    rows = []
    for name, role in plan.roles.items():
        terms = [
            f"{type(term.loss).__name__} on {term.source}"
            + (f", advantage {type(term.advantage).__name__}" if term.advantage is not None else "")
            for term in plan.terms
            if term.role == name
        ]
        rows.append((name, role.options.model, "; ".join(terms) if role.trained else "frozen"))
    return rows


def _versions(run: RunView) -> dict[str, str]:
    """Return the versions of Python, of libraries and of the distributions of plugins."""
    plugins = run.config.registry.plugins.values() if run.config.registry is not None else ()
    found = {"python": platform.python_version(), **{each.distribution: each.version for each in plugins}}
    return found | {name: metadata.version(name) for name in LIBRARIES}
