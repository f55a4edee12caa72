"""The rows that fit are counted by all ranks together: each row by one of them, and a bad row is every rank's error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_core import DataError, World
from rlhf_core.data.prepare import SHARE
from rlhf_core.run.epochs import count_fitting


class Ranks(World):
    """One of several ranks whose counts are gathered beforehand, in rank order."""

    def __init__(self, rank: int, size: int, others: dict[int, Any]) -> None:
        self.rank, self.size, self.others = rank, size, others

    def gather(self, thing: Any) -> list[Any]:
        self.others[self.rank] = thing
        return [self.others.get(rank, (0, None)) for rank in range(self.size)]


class Counter:
    """A preparer that drops every third row, and remembers what it was given."""

    block = 1

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.seen: list[int] = []
        self.bad = bad

    def __call__(self, rows: Sequence[int]) -> list[Any]:
        self.seen += rows
        return [DataError(f"row {row}") if row in self.bad else row if row % 3 else None for row in rows]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [0, 1, SHARE, 5 * SHARE + 1])
def test_every_row_is_counted_once(size: int, length: int) -> None:
    rows: Any = range(length)
    counters = [Counter() for _ in range(size)]
    gathered: dict[int, Any] = {}
    totals = [count_fitting(rows, counter, Ranks(k, size, gathered)) for k, counter in enumerate(counters)]  # type: ignore[arg-type]
    assert totals[-1] == sum(1 for row in rows if row % 3), "the last rank has all counts"
    assert sorted(row for counter in counters for row in counter.seen) == list(rows)
    assert max(len(each.seen) for each in counters) <= length // size + SHARE


def test_the_first_bad_row_is_the_error_of_every_rank() -> None:
    rows: Any = range(4 * SHARE)
    gathered: dict[int, Any] = {}
    for _ in range(2):  # the second time, every rank knows what the others found
        for rank in (1, 0):
            with pytest.raises(DataError) as caught:
                count_fitting(rows, Counter(bad=[SHARE + 1, 2 * SHARE + 5]), Ranks(rank, 2, gathered))  # type: ignore[arg-type]
    assert str(caught.value) == f"row {SHARE + 1}"
