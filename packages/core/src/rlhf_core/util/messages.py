"""Messages of a run, through `logging`: the logger `rlhf`, and a handler that writes them to the console.

A handler is installed by the command line, and by a run that finds none. From Python, this silences all but errors:

    logging.getLogger("rlhf").setLevel(logging.ERROR)

A handler of the caller, on `rlhf` or on the root logger, receives the messages in place of the console.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["PREFIX", "console", "console_messages", "install_console", "log", "progress"]

PREFIX = "rlhf-run: "
"""Prefix of an event on the console."""
log = logging.getLogger("rlhf")
"""Events: `rlhf-run: …` on the console."""
progress = logging.getLogger("rlhf.progress")
"""The lines of a run that goes well: its head, its steps, its result; the console shows them unchanged."""


class View(Protocol):
    """A live display at the bottom of a terminal."""

    def erase(self) -> None:
        """Make room for a message."""

    def draw(self, force: bool = False) -> None:
        """Draw again; `force` also if it was drawn a moment ago."""


class _Console(logging.Handler):
    """Writes to the standard error of the moment, so that redirected streams get the messages."""

    view: View | None = None
    """the display that messages go above"""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "" if record.name == progress.name else PREFIX
            if self.view is not None:
                self.view.erase()
            print(f"{prefix}{self.format(record)}", file=sys.stderr, flush=True)
            if self.view is not None:
                self.view.draw(force=True)
        except Exception:
            self.handleError(record)


console = _Console()
"""The handler that writes to the console."""


def install_console() -> None:
    """Write messages to the console, unless a handler of `rlhf` or of the root logger takes them."""
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(console)


@contextmanager
def console_messages() -> Iterator[None]:
    """Write messages to the console, once, whatever handlers a library adds: for a process of the command line."""
    before = (log.level, log.propagate, list(log.handlers))
    log.setLevel(logging.INFO)
    log.propagate, log.handlers = False, [console]
    try:
        yield
    finally:
        log.setLevel(before[0])
        log.propagate, log.handlers = before[1:]
