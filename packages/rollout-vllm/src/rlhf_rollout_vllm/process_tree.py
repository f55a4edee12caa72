"""Processes and what they started, as Linux lists them."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["kill_all", "process_tree"]


def kill_all(processes: Sequence[int]) -> None:
    """End processes at once, as far as they are there."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def process_tree(process: int) -> list[int]:
    """Return the numbers of a process and of all that it started, as Linux lists them."""
    found = [process]
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            for child in listed.read_text().split():
                found += process_tree(int(child))
    return found
