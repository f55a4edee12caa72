"""A live display of a run: a line at the bottom of a terminal, or a view in a notebook's cell.

    step 4/20 ███░░░░░░░  sampling 12/32  reward +0.420 ± 0.310  1:10 left

It draws at most some times per second, when a report of `rlhf_core.util.activity` or a step comes in; no thread runs
next to the run. In a pipe there is none.
"""

from __future__ import annotations

import html
import logging
import os
import shutil
import sys
import time
from importlib import import_module
from typing import Any

from rlhf_core.util.activity import activity
from rlhf_core.util.messages import console, log, progress

__all__ = ["LiveView", "NotebookView", "TerminalView", "clock", "make_view"]

BAR = 10
"""Characters of the bar."""
LINES = 10
"""Steps that a notebook's cell shows."""


def make_view(steps: int, done: int) -> LiveView | None:
    """Return a display of a run, as its surroundings allow: none in a pipe, in a silenced run, or with a user's handler.

    Args:
        steps: optimizer phases of the run.
        done: those that are finished.
    """
    if not progress.isEnabledFor(logging.INFO) or console not in log.handlers:
        return None
    if in_notebook():
        return NotebookView(steps, done)
    if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return TerminalView(steps, done)
    return None


def in_notebook() -> bool:
    """Return True inside a notebook's kernel. A terminal's IPython has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


class LiveView(logging.Handler):
    """Base class of both displays: the text, and when to draw it.

    Args:
        steps: optimizer phases of the run.
        done: those that are finished.
    """

    interval = 0.1
    """seconds between two drawings"""

    def __init__(self, steps: int, done: int) -> None:
        super().__init__(logging.DEBUG)
        self.steps, self.step = steps, done
        self.doing, self.summary = "starting", ""
        self.seconds_per_step: float | None = None
        self.began = time.perf_counter()
        self._drawn = 0.0

    def open(self) -> None:
        """Listen to reports, and draw."""
        activity.addHandler(self)
        activity.setLevel(logging.DEBUG)
        self.draw(force=True)

    def close(self) -> None:
        """Listen no more, and leave a tidy screen."""
        activity.removeHandler(self)
        activity.setLevel(logging.INFO)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a report."""
        try:
            assert isinstance(record.args, tuple)
            what, done, total = record.args
            self.doing = f"{what} {done}/{total}" if total else str(what)
            self.draw()
        except Exception:
            self.handleError(record)

    def finish_step(self, step: int, line: str, summary: str, seconds_per_step: float) -> None:
        """Take a finished step: its line, what the display shows of it, and the seconds that steps take."""
        self.step, self.summary, self.seconds_per_step = step, summary, seconds_per_step
        self.began = time.perf_counter()
        progress.info(line)
        self.draw(force=True)

    def draw(self, force: bool = False) -> None:
        """Draw the present text, unless it was drawn a moment ago."""
        now = time.perf_counter()
        if force or now - self._drawn >= self.interval:
            self._drawn = now
            self.show(self.text(now))

    def show(self, text: str) -> None:
        """Put the text on the screen."""
        raise NotImplementedError

    def text(self, now: float) -> str:
        """Return the line of the display."""
        filled = BAR * self.step // max(1, self.steps)
        parts = [f"step {min(self.step + 1, self.steps)}/{self.steps} {'█' * filled}{'░' * (BAR - filled)}", self.doing]
        spent = now - self.began
        if self.seconds_per_step is None:
            parts.append(f"{clock(spent)} so far")
        else:
            parts += [self.summary, f"{clock(self.seconds_per_step * (self.steps - self.step) - spent)} left"]
        return "  ".join(filter(None, parts))


class TerminalView(LiveView):
    """The last line of a terminal. Messages of the console go above it."""

    def open(self) -> None:
        console.view = self
        super().open()

    def close(self) -> None:
        super().close()
        console.view = None
        self.erase()

    def show(self, text: str) -> None:
        width = shutil.get_terminal_size((80, 24)).columns
        sys.stderr.write(f"\r{text[: width - 1]}\x1b[K")
        sys.stderr.flush()

    def erase(self) -> None:
        """Clear the line, for a message to take its place."""
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


class NotebookView(LiveView):
    """An output of a notebook's cell that is replaced in place: a progress bar, and the last steps."""

    interval = 0.5

    def __init__(self, steps: int, done: int) -> None:
        super().__init__(steps, done)
        self.lines: list[str] = []
        self._handle: Any = None

    def finish_step(self, step: int, line: str, summary: str, seconds_per_step: float) -> None:
        """Keep the step's line in the view, where the console would have printed it."""
        self.lines = [*self.lines, line][-LINES:]
        self.step, self.summary, self.seconds_per_step = step, summary, seconds_per_step
        self.began = time.perf_counter()
        self.draw(force=True)

    def close(self) -> None:
        super().close()
        self.doing = "done" if self.step >= self.steps else "stopped"
        self.draw(force=True)

    def show(self, text: str) -> None:
        ipython = import_module("IPython.display")
        bar = f'<progress value="{self.step}" max="{max(1, self.steps)}"></progress>'
        page = ipython.HTML(f"{bar} {html.escape(text)}<pre>{html.escape(chr(10).join(self.lines))}</pre>")
        if self._handle is None:
            self._handle = ipython.display(page, display_id=True)
        else:
            self._handle.update(page)


def clock(seconds: float) -> str:
    """Return seconds as `1:05`, or `2:01:05` from an hour on."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
