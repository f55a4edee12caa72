"""The queue under random interleavings of sample, train, sync, kill and restore: no uid lost or doubled, no token too old.

`RLHF_INTERLEAVINGS=10000` runs as many as the acceptance asks for; the default is small.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf_core.asynchronous.queue import IterationQueue

BATCH = 3


@dataclass
class Disk:
    """In-memory checkpoint: the last step that was trained on, and the position of the data after it."""

    trained: int = 0
    position: int = 0
    uids: list[int] = field(default_factory=list)
    """trained on so far"""


class QueueMachine(RuleBasedStateMachine):
    """A run by hand: rows are drawn when an iteration begins, engines have the weights of the last sync."""

    @initialize(ahead=st.integers(0, 4), last=st.integers(1, 12))
    def begin_run(self, ahead: int, last: int) -> None:
        self.ahead, self.last = ahead, last
        self.disk = Disk()
        self.restore()

    def restore(self) -> None:
        """Continue from the checkpoint; what was under way is gone."""
        self.queue = IterationQueue(self.ahead, self.last, self.disk.trained)
        self.position, self.uids = self.disk.position, list(self.disk.uids)
        self.synced = self.disk.trained
        self.under_way: list[tuple[int, list[int], int, int]] = []
        """(step, uids, version of the weights, position after it) of those that are begun and not trained on"""
        self.positions = self.disk.position

    @precondition(lambda self: self.queue.may_begin)
    @rule()
    def sample(self) -> None:
        step = self.queue.begin()
        uids = list(range(self.position, self.position + BATCH))
        self.position += BATCH
        self.under_way.append((step, uids, self.synced, self.position))

    @precondition(lambda self: self.queue.begun > self.queue.sampled)
    @rule()
    def finish_sampling(self) -> None:
        self.queue.complete()

    @precondition(lambda self: self.queue.may_train)
    @rule()
    def train_and_sync(self) -> None:
        step, uids, version, position = self.under_way.pop(0)
        age = self.queue.trained - version  # an update per step
        assert 0 <= age <= self.ahead, f"step {step} has tokens {age} updates old"
        self.uids += uids
        assert self.queue.train() == step
        self.synced, self.positions = step, position

    @rule()
    def save(self) -> None:
        self.disk = Disk(self.queue.trained, self.positions, list(self.uids))

    @rule()
    def kill(self) -> None:
        self.restore()

    @invariant()
    def every_uid_is_trained_on_once_and_in_order(self) -> None:
        assert self.uids == list(range(BATCH * self.queue.trained))

    @invariant()
    def nothing_leaks(self) -> None:
        assert len(self.under_way) == self.queue.begun - self.queue.trained <= self.ahead + 1
        assert self.queue.trained <= self.queue.sampled <= self.queue.begun <= self.last

    @invariant()
    def somebody_can_go_on_until_the_end(self) -> None:
        sampling = self.queue.begun > self.queue.sampled
        over = self.queue.trained == self.last
        assert over or sampling or self.queue.may_begin or self.queue.may_train


TestQueue = pytest.mark.filterwarnings("ignore")(QueueMachine.TestCase)
TestQueue.settings = settings(
    max_examples=int(os.environ.get("RLHF_INTERLEAVINGS", "100")), stateful_step_count=40, deadline=None
)


def test_without_sampling_ahead_everything_is_in_turn() -> None:
    queue = IterationQueue(ahead=0, last=2)
    for step in (1, 2):
        assert queue.begin() == step
        assert not queue.may_begin
        queue.complete()
        assert not queue.may_begin, "the weights of this step come first"
        assert queue.train() == step
    assert not queue.may_begin
    assert not queue.may_train


def test_steps_out_of_turn_are_a_defect_that_is_named() -> None:
    queue = IterationQueue(ahead=1, last=3)
    with pytest.raises(AssertionError, match="nothing is sampled"):
        queue.train()
    queue.begin()
    with pytest.raises(AssertionError, match="iteration 2 begins too early"):
        queue.begin()
