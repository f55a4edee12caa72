"""Results of the checks as one JSON file and one Markdown page, both rewritten after every event."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_checks.check import Check

__all__ = ["Report"]


class Report:
    """The results of a run.

    Args:
        folder: where `gpu.json` and `gpu.md` go.
        checks: those that were asked for.
        title: what the run was, the first line of the page.
    """

    def __init__(self, folder: Path, checks: Sequence[Check], title: str) -> None:
        self.folder = folder
        self.title = title
        self.checks = list(checks)
        self.started = time.time()
        self._begun: dict[str, float] = {}
        self.found: dict[str, dict[str, Any]] = {
            check.name: {"title": check.title, "status": "not run", "seconds": 0.0, "rows": [], "goals": [], "notes": [],
                         "profiles": [], "wrong": [], "traceback": []}
            for check in checks
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def begin(self, name: str) -> None:
        """Record that a check runs."""
        self._begun[name] = time.monotonic()
        self.found[name]["status"] = "running when this page was written"
        self.write()

    def seconds_of(self, name: str) -> float:
        """Return how long a check has run."""
        return time.monotonic() - self._begun[name]

    def add(self, name: str, event: Mapping[str, Any]) -> None:
        """Record an event of a check."""
        found = self.found[name]
        for kind in ("row", "goal", "note", "profile"):
            if kind in event:
                found[f"{kind}s"].append(event[kind])
        if "wrong" in event:
            found["wrong"].append(event["wrong"])
        found["traceback"] = event.get("traceback", found["traceback"])
        self.write()

    def end(self, name: str, status: str, seconds: float) -> None:
        """Record how a check ended."""
        found = self.found[name]
        found["seconds"] = round(seconds, 1)
        found["status"] = status if status != "done" or not found["wrong"] else "failed: " + "; ".join(found["wrong"])
        self.write()

    def failed(self) -> list[str]:
        """Return the checks that did not end well, apart from those without time."""
        return [name for name, found in self.found.items() if not found["status"].startswith(("done", "not run"))]

    def write(self) -> None:
        """Write both files anew, each under another name first."""
        whole = {
            "title": self.title,
            "started": self.started,
            "seconds": round(time.time() - self.started, 1),
            "checks": self.found,
        }
        _replace(self.folder / "gpu.json", json.dumps(whole, indent=1, default=str) + "\n")
        _replace(self.folder / "gpu.md", self.markdown())

    def markdown(self) -> str:
        """Return the page."""
        lines = [f"# {self.title}", ""]
        lines += [
            f"{time.strftime('%d %B %Y %H:%M UTC', time.gmtime(self.started))}, {time.time() - self.started:.0f} s.",
            "",
        ]
        lines += ["| check | result | seconds |", "|---|---|---|"]
        lines += [
            f"| `{name}` | {_cell(found['status'])} | {found['seconds']:.0f} |" for name, found in self.found.items()
        ]
        goals = [goal for found in self.found.values() for goal in found["goals"]]
        if goals:
            lines += ["", "## Goals", "", *_goals(goals)]
        for name, found in self.found.items():
            lines += ["", f"## {found['title']}", "", f"`{name}`: {found['status']}", *_section(found)]
        return "\n".join(lines) + "\n"


def _goals(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    words = {True: "met", False: "**missed**", None: "not judged in a rehearsal"}
    rows = [
        f"| {goal['what']} | {_number(goal['value'])} | {'at least' if goal['at_least'] else 'at most'} "
        f"{_number(goal['target'])} | {words[goal['met']]} |"
        for goal in goals
    ]
    return ["| goal | seen | target | |", "|---|---|---|---|", *rows]


def _section(found: Mapping[str, Any]) -> list[str]:
    """Return a check's tables, notes, profiles and the end of its traceback."""
    lines: list[str] = []
    tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        tables.setdefault(tuple(row), []).append(row)
    for columns, rows in tables.items():
        lines += ["", f"| {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]
    if found["notes"]:
        lines += ["", *(f"- {note}" for note in found["notes"])]
    for profile in found["profiles"]:
        gap = max(0.0, 1 - profile["busy_ms"] / max(profile["usual_ms"], 1e-9))
        told = f"{profile['usual_ms']:.1f} ms, no kernel in {100 * gap:.0f} % of it, {profile['launches']} launches"
        lines += ["", f"Profile of {profile['title']}: {told} ({profile['wall_ms']:.1f} ms with the profiler)."]
        lines += ["", "| kernel | ms | calls |", "|---|---|---|"]
        lines += [f"| `{_cell(each['kernel'])}` | {each['ms']:.2f} | {each['calls']} |" for each in profile["top"]]
    if found["traceback"]:
        lines += ["", "```text", *found["traceback"], "```"]
    return lines


def _cell(value: Any) -> str:
    """Return a value as a cell of a table."""
    return _number(value) if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    """Return a figure with three or four digits that mean something."""
    if value == 0 or 0.001 <= abs(value) < 100000:
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2e}"


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader, or a run that is cut, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
