"""Limits for code that comes with data: a chat template that loops for ever or builds gigabytes ends with an error.

Jinja's sandbox guards attributes, not time or memory. Templates run as Python code, so a trace function
sees each line of them, in any thread, and reads the clock and the process's memory.
One C call between two lines is not cut short.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["OverLimit", "rendering_limits"]

SECONDS = 10.0
"""Processor time of one rendering; usual ones take a millisecond."""
MEGABYTES = 1024
"""Growth of the process's peak memory during one rendering."""
UNWATCHED = 0.05
"""Seconds in which clock and memory are not asked for, which costs more than most templates."""
TEMPLATE = "<template>"
"""The file name of the code that Jinja compiles."""
PER_MEGABYTE = 1 << 20 if sys.platform == "darwin" else 1 << 10
"""Units of `ru_maxrss`."""


class OverLimit(ValueError):
    """The code took too much time or memory."""


@contextmanager
def rendering_limits(seconds: float = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Raise `OverLimit` in the block when it takes more than `seconds` of processor time or `megabytes` of memory."""
    soon = time.perf_counter() + UNWATCHED
    limits: tuple[float, float] | None = None

    def enter(frame: FrameType, _event: str, _value: Any) -> Any:
        """Look at the lines of templates, not at those of the libraries that they call."""
        return look if frame.f_code.co_filename == TEMPLATE else None

    def look(_frame: FrameType, _event: str, _value: Any) -> Any:
        nonlocal limits
        if time.perf_counter() < soon:
            return look
        if limits is None:
            limits = time.thread_time() + seconds, _peak_megabytes() + megabytes
        elif time.thread_time() > limits[0]:
            raise OverLimit(f"it takes more than {seconds:g} s")
        elif _peak_megabytes() > limits[1]:
            raise OverLimit(f"it takes more than {megabytes} MB of memory")
        return look

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    except MemoryError:
        raise OverLimit("it needs more memory than is available") from None
    except RecursionError:
        raise OverLimit("it recurses without end") from None
    finally:
        sys.settrace(before)


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / PER_MEGABYTE
