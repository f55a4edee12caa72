"""Whoever waits for calls in threads is interrupted at once, and sees the first failure."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import pytest

from rlhf_core.util.threads import map_in_threads


class Stop(BaseException):
    """Exception that a stop raises in the main thread."""


def test_results_are_in_order_and_a_failure_is_raised() -> None:
    assert map_in_threads(lambda number: 1 / number, [1, 2, 4], 3) == [1.0, 0.5, 0.25]
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda number: 1 / number, [1, 0, 4], 3)


def test_an_interrupted_wait_does_not_wait_for_the_calls_and_begins_no_more() -> None:
    answered, begun = threading.Event(), []

    def ask(number: int) -> None:
        begun.append(number)
        answered.wait(60)

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    started = time.monotonic()
    try:
        with pytest.raises(Stop):
            map_in_threads(ask, range(10), 2)
        assert time.monotonic() - started < 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        answered.set()
    assert len(begun) == 2
