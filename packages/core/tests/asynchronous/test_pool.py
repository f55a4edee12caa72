"""Groups in progress: random completion times, and the promises of the pool."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.asynchronous.pool import GroupPool


@dataclass
class Timed:
    """A group that is complete after so many slices."""

    number: int
    slices: int
    begun: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.slices <= 0


@given(
    slices=st.lists(st.integers(1, 12), min_size=200, max_size=200),
    batch=st.integers(1, 4),
    surplus=st.integers(0, 4),
    most=st.integers(1, 6),
)
def test_no_group_is_lost_doubled_or_too_old(slices: list[int], batch: int, surplus: int, most: int) -> None:
    pool: GroupPool[Timed] = GroupPool(batch, min(surplus, batch), most)
    waiting = [Timed(number, each) for number, each in enumerate(slices)]
    trained: list[int] = []
    for step in range(1, 25):
        while pool.lacking:
            pool.groups.append(waiting.pop(0))
        calls = 0
        while not pool.enough(step):
            calls += 1
            for group in pool.groups:
                group.begun = step - 1 if group.begun is None else group.begun  # everything in turn: no step ahead
                group.slices -= 1
        taken = pool.take(step)
        assert len(taken) == batch
        assert calls <= max(slices), "a step lasts as long as its longest group at most"
        for group in taken:
            assert group.begun is not None
            assert step - 1 - group.begun <= most
        trained += [group.number for group in taken]
    assert len(set(trained)) == len(trained) == 24 * batch
    assert {*trained, *(group.number for group in pool.groups), *(group.number for group in waiting)} == set(range(200))


def test_the_oldest_complete_groups_come_first_and_the_surplus_stays() -> None:
    pool: GroupPool[Timed] = GroupPool(batch=2, surplus=1, most=3)
    pool.groups = [Timed(0, 9, begun=0), Timed(1, 0, begun=0), Timed(2, 0, begun=0), Timed(3, 0, begun=0)]
    assert pool.enough(1)
    assert [group.number for group in pool.take(1)] == [1, 2]
    assert [group.number for group in pool.groups] == [0, 3]
    assert pool.lacking == 1


def test_a_group_that_would_be_too_old_next_is_waited_for() -> None:
    pool: GroupPool[Timed] = GroupPool(batch=1, surplus=1, most=2)
    pool.groups = [Timed(0, 1, begun=0), Timed(1, 0, begun=1)]
    assert pool.enough(2), "in step 3 it would be 2 steps old"
    assert not pool.enough(3)
    pool.groups[0].slices = 0
    assert [group.number for group in pool.take(3)] == [0]


def test_at_a_deadline_one_group_is_enough() -> None:
    pool: GroupPool[Timed] = GroupPool(batch=3, surplus=0, most=5)
    pool.groups = [Timed(0, 1, begun=0), Timed(1, 0, begun=0), Timed(2, 4, begun=0)]
    assert not pool.enough(1)
    assert pool.enough(1, few=True)
    assert [group.number for group in pool.take(1)] == [1]
    assert not pool.enough(1, few=True), "none is complete"


def test_more_surplus_than_a_step_takes_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="too old at once"):
        GroupPool(batch=2, surplus=3, most=1)
