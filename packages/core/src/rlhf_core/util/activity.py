"""Reports of what a run does inside a step, for a live display: `sampling 12/32`.

They go through the logger `rlhf.activity` at level DEBUG, where only a display or a user's handler listens:

    logging.getLogger("rlhf.activity").setLevel(logging.DEBUG)
    logging.getLogger("rlhf.activity").addHandler(handler)   # record.args is (what, done, total)

Each rank and each Ray worker has its own logger; the display listens in the first process.
"""

from __future__ import annotations

import logging

__all__ = ["activity", "report"]

activity = logging.getLogger("rlhf.activity")
"""Reports, apart from the messages of `rlhf`: they are never lines on the console."""
activity.propagate = False
activity.setLevel(logging.INFO)


def report(what: str, done: int = 0, total: int = 0) -> None:
    """Report that `done` of `total` parts of something are done; without a total, that it begins."""
    if activity.isEnabledFor(logging.DEBUG):
        activity.debug("%s %d/%d", what, done, total)
