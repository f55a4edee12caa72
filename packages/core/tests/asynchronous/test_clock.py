"""Simulated time: threads take turns, the clock jumps, and the same program gives the same times everywhere."""

from __future__ import annotations

import threading
import time

import pytest

from rlhf_core.util.clock import Deadlock, RealClock, current_time, simulated_time, sleep, start, wait_for


def test_time_passes_only_while_everybody_sleeps_and_the_earliest_wakes_first() -> None:
    """An hour of three threads, in the order of their wake-ups: 10 + 30 s, 25 + 25 s, and the main thread at 45 s."""
    seen: list[tuple[str, float]] = []

    def sleeper(name: str, seconds: float) -> None:
        for _ in range(2):
            sleep(seconds)
            seen.append((name, current_time()))
            seconds = 30.0 if name == "a" else seconds

    began = time.monotonic()
    with simulated_time():
        start(lambda: sleeper("a", 10.0), "a")
        start(lambda: sleeper("b", 25.0), "b")
        sleep(45.0)
        seen.append(("main", current_time()))
        sleep(3600.0)
        assert current_time() == 3645.0
    assert seen == [("a", 10.0), ("b", 25.0), ("a", 40.0), ("main", 45.0), ("b", 50.0)]
    assert time.monotonic() - began < 30.0, "nobody slept for real"


def test_a_wait_ends_when_its_condition_holds_or_its_deadline_is_over() -> None:
    changed, box = threading.Condition(), [0]

    def fill() -> None:
        sleep(3.0)
        with changed:
            box[0] = 1
            changed.notify_all()

    with simulated_time():
        start(fill, "fill")
        with changed:
            assert not wait_for(changed, lambda: bool(box[0]), 2.0)
            assert current_time() == 2.0
            assert wait_for(changed, lambda: bool(box[0]), 5.0)
            assert current_time() == 3.0


def test_threads_that_wait_for_each_other_are_told_so() -> None:
    changed = threading.Condition()
    with simulated_time(), changed, pytest.raises(Deadlock):
        wait_for(changed, lambda: False)


def test_real_time_keeps_the_deadline_of_a_wait() -> None:
    changed = threading.Condition()
    with changed:
        assert not RealClock().wait_for(changed, lambda: False, 0.01)
        assert RealClock().wait_for(changed, lambda: True, 0.0)
