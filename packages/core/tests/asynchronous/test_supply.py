"""Iterations from a thread: their order, errors, pauses and ends, and the gate in front of the engines."""

from __future__ import annotations

import threading

import pytest

from rlhf_core.asynchronous.gate import EngineGate
from rlhf_core.asynchronous.queue import IterationQueue
from rlhf_core.asynchronous.supply import AheadSupply
from rlhf_core.util.clock import current_time, simulated_time, sleep, start


def test_an_error_is_raised_at_the_iteration_that_had_it() -> None:
    def collect(step: int) -> int:
        if step == 3:
            raise ValueError("row 17")
        return step

    supply = AheadSupply(collect, IterationQueue(ahead=2, last=5), threading.Condition())
    assert [supply.take(), supply.take()] == [1, 2]
    for _ in range(2):
        with pytest.raises(ValueError, match="row 17"):
            supply.take()
    supply.close()


def test_nothing_is_collected_in_a_pause_and_the_call_in_progress_is_waited_for() -> None:
    spans: list[tuple[float, float]] = []

    def collect(step: int) -> int:
        began = current_time()
        sleep(10.0)
        spans.append((began, current_time()))
        return step

    with simulated_time():
        supply = AheadSupply(collect, IterationQueue(ahead=3, last=3), threading.Condition())
        assert supply.take() == 1
        sleep(5.0)  # in the middle of the second one
        with supply.pause():
            assert current_time() == 20.0
            sleep(100.0)
        assert [supply.take(), supply.take()] == [2, 3]
        supply.close()
    assert spans == [(0.0, 10.0), (10.0, 20.0), (120.0, 130.0)]


def test_closing_waits_for_the_call_in_progress_and_not_beyond_its_deadline() -> None:
    with simulated_time():
        supply = AheadSupply(
            lambda step: sleep(1e6), IterationQueue(ahead=1, last=9), threading.Condition(), close_seconds=60.0
        )
        start(supply.take, "loop")
        sleep(1.0)
        supply.close()
        assert current_time() == 61.0
        never = AheadSupply(lambda step: step, IterationQueue(ahead=1, last=9), threading.Condition())
        never.close()
        never.close()
        assert current_time() == 61.0


def test_new_weights_go_before_calls_that_wait_and_after_the_one_in_progress() -> None:
    """The sampler calls at 0, 10, … s; weights come at 5 s: they wait until 10 s, and the sampler's next call is after them."""
    gate, calls = EngineGate(), list[tuple[float, int]]()

    def sampler() -> None:
        for _ in range(2):
            with gate.sampling() as trained:
                calls.append((current_time(), trained))
                sleep(10.0)

    with simulated_time():
        start(sampler, "sampler")
        sleep(5.0)
        with gate.weights(1):
            assert current_time() == 10.0
            sleep(2.0)
        sleep(100.0)
    assert calls == [(0.0, 0), (12.0, 1)]


def test_weights_that_could_not_be_brought_are_not_counted() -> None:
    gate = EngineGate(trained=4)
    with pytest.raises(OSError, match="lost"), gate.weights(5):
        raise OSError("lost")
    with gate.sampling() as trained:
        assert trained == 4


def test_a_call_that_is_not_due_in_time_is_told() -> None:
    gate = EngineGate()
    with simulated_time():
        with pytest.raises(TimeoutError), gate.sampling(lambda: False, seconds=30.0):
            pass
        assert current_time() == 30.0
