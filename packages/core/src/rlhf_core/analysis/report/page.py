"""The page of a report: one HTML file with its style and script, readable on a phone, in light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlhf_core.analysis.report.panels import RunFiles, evaluation_rows, panels, phases, sample_pairs

__all__ = ["MARK", "is_report", "page", "run_sections", "table"]

LONGEST = 2000
"""Characters of an answer that are shown."""

MARK = "<!-- rlhf-run report -->"
"""Begins every report: a file without it is not written over."""


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """Return the page.

    Args:
        title: its title.
        sections: heading and HTML of each part; empty ones are left out.
    """
    folder = files("rlhf_core.analysis.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "".join(f"<section><h2>{escape(heading)}</h2>{html}</section>" for heading, html in sections if html)
    return (
        f'{MARK}<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body><main><h1>{escape(title)}</h1>{body}</main>"
        f'<div id="tip" hidden></div><script>{script}</script></body></html>\n'
    )


def run_sections(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Yield heading and HTML of the parts of a run's report."""
    yield "Before and after", table(("measure", "first", "last", "difference"), evaluation_rows(run))
    drawn = "".join(panels(run))
    yield "Curves; bold lines are moving means of the faint ones", drawn and f'<div class="panels">{drawn}</div>'
    yield "Samples", "".join(_sample(*pair) for pair in sample_pairs(run))
    yield "Time", _bars(phases(run))
    yield "Plan", table(("role", "model", "trained by"), run.about.get("plan", ()))
    yield "Versions", table(("package", "version"), list(run.about.get("versions", {}).items()))
    yield "Configuration", _foldable("config.toml", run.config)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; nothing without rows."""
    if not rows:
        return ""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></div>'


def _sample(question: str, first: Any, last: Any) -> str:
    """Return two answers to a prompt side by side."""
    cards = []
    for row in (first, last):
        reward = row.get("reward")
        shown = f", reward {reward:+.2f}" if isinstance(reward, (int, float)) else ""
        head = f"<b>step {escape(str(row.get('step')))}</b>{shown}"
        cards.append(f'<div class="card">{head}<p>{escape(str(row.get("completion", ""))[:LONGEST])}</p></div>')
    return f'<div class="pair"><p class="asked">{escape(question)}</p><div class="two">{"".join(cards)}</div></div>'


def _bars(parts: Sequence[tuple[str, float]]) -> str:
    """Return a bar for each part of a whole, with its seconds and share."""
    total = sum(value for _, value in parts)
    rows = []
    for name, value in parts:
        share = value / total
        bar = f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
        rows.append(f"<tr><td>{escape(name)}</td><td>{value:.1f} s</td><td>{share:.0%}</td><td>{bar}</td></tr>")
    return f'<table class="bars"><tbody>{"".join(rows)}</tbody></table>' if rows else ""


def _foldable(name: str, text: str) -> str:
    """Return a text that is shown on request."""
    return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def is_report(path: Path) -> bool:
    """Return True if a file was written by this module."""
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()
