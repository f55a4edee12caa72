"""Calls are dealt to eight processes by a simulated clock: the time that they take is compared with perfect division.

A message takes this process and the other one about as long as on an idle machine; everything else is the cost of the calls.
"""

from __future__ import annotations

import pickle
from collections import deque
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core.reward.func import _parts
from rlhf_core.util import worker_processes
from rlhf_core.util.worker_child import HEAD

WORKERS, GROUP = 8, 8
SENT, RECEIVED, SERVED, WOKEN = 20e-6, 40e-6, 60e-6, 60e-6
"""seconds that a message takes this process, an answer, a call beside its cost, and an idle process until it works"""


class Clock:
    """The simulated time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Process:
    """A worker that answers each call when its cost has passed; the argument of a call is its cost."""

    ready, process, began = True, True, 0.0

    def __init__(self, clock: Clock, number: int) -> None:
        self.clock, self.output, self.input = clock, 2 * number, 2 * number + 1
        self.calls: deque[int] = deque()
        self.outbox = bytearray()
        self.answers: deque[float] = deque()  # when each comes
        self.free = 0.0

    def end_if_dead(self) -> None:
        pass

    def write(self) -> None:
        while self.outbox:
            (length,) = HEAD.unpack_from(self.outbox)
            _, (cost,) = pickle.loads(self.outbox[HEAD.size : HEAD.size + length])
            del self.outbox[: HEAD.size + length]
            self.clock.now += SENT
            idle = self.free <= self.clock.now
            self.free = (self.clock.now + WOKEN if idle else self.free) + cost + SERVED
            self.answers.append(self.free)

    def read(self) -> list[None]:
        self.clock.now += RECEIVED
        self.answers.popleft()
        return [None]


class Selector:
    """Waits for the first answer of all."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.watched = clock, dict[int, Process]()

    def __enter__(self) -> Selector:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_map(self) -> dict[int, Process]:
        return self.watched

    def register(self, end: int, _: int, worker: Process) -> None:
        self.watched[end] = worker

    def select(self, _: float) -> list[tuple[Any, int]]:
        first = min((worker for worker in self.watched.values() if worker.answers), key=lambda each: each.answers[0])
        self.clock.now = max(self.clock.now, first.answers[0])
        return [(SimpleNamespace(data=first), 1)]


def division(costs: list[float], patch: pytest.MonkeyPatch) -> float:
    """The share of perfect division that the calls of these rows reach."""
    clock = Clock()
    patch.setattr(worker_processes, "time", clock)
    patch.setattr(worker_processes.selectors, "DefaultSelector", lambda: Selector(clock))
    calls = [(sum(costs[row] for row in part),) for part in _parts(len(costs), 0, WORKERS)]
    workers: Any = [Process(clock, number) for number in range(WORKERS)]
    found = worker_processes._Dispatch(workers, calls, 0.0, 0).run()
    assert found == [None] * len(calls)
    return sum(costs) / WORKERS / clock.now


def rows_with(kind: str, samples: int, place: float) -> list[float]:
    """Costs of 0.1 ms on average: half of all that of one prompt, or almost all that of an eighth of the rows."""
    total = 1e-4 * samples
    slow, share = {"even": (0, 0.0), "an eighth": (samples // 8, 0.9975), "one prompt": (GROUP, 0.5)}[kind]
    costs = [(1 - share) * total / (samples - slow)] * (samples - slow)
    start = int(place * len(costs))
    costs[start:start] = [share * total / slow for _ in range(slow)]
    assert sum(costs) == pytest.approx(total)
    return costs


@pytest.mark.parametrize("samples", [1024, 4096])
@pytest.mark.parametrize("place", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["even", "an eighth", "one prompt"])
def test_samples_of_a_tenth_of_a_millisecond_reach_four_fifths(
    samples: int, place: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow prompt at the start is forgotten: calls are sent ahead again."""
    assert division(rows_with(kind, samples, place), monkeypatch) >= 0.8


def test_the_completions_of_a_slow_prompt_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is in a call of its own, and these go to different processes, wherever the prompt is."""
    shares = [division(rows_with("one prompt", 4096, place / 40), monkeypatch) for place in range(41)]
    assert min(shares) >= 0.8


def test_prompts_of_unlike_cost_reach_four_fifths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithms of their costs have a deviation of 1.5: the slowest of 128 takes about a hundred times the median."""
    for seed in range(20):
        random = Random(seed)
        costs = [cost for _ in range(128) for cost in [random.lognormvariate(0, 1.5)] * GROUP]
        assert division([0.1024 * cost / sum(costs) for cost in costs], monkeypatch) >= 0.8
