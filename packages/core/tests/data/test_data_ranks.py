"""Ranks prepare their own rows only, and together have the batches that one process has."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.contract.batch import Example
from rlhf_core.contract.selection import Sampler
from rlhf_core.data.chunks import assign_ranks, rank_bounds
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.rows import TokenizedRow
from rlhf_core.data.stream import Stream
from rlhf_core.errors import DataError, UsageError

Result = TypeVar("Result")
Rows = list[tuple[int, int]]
"""(row number, uid)"""


class Lines:
    """Rows that can only be read in order."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)


class Meeting:
    """Ranks that are threads, and add up arrays."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums = 0
        self._barrier = threading.Barrier(size)
        self._parts: list[Any] = [None] * size

    def add_up(self, rank: int) -> Callable[[np.ndarray], np.ndarray]:
        def add(values: np.ndarray) -> np.ndarray:
            self._parts[rank] = values
            self._barrier.wait(60)
            total: np.ndarray = np.sum(self._parts, axis=0)
            self._barrier.wait(60)
            self.sums += rank == 0
            return total

        return add

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """Call `work` with each rank at the same time; what is raised in one ends the meeting."""

        def guarded(rank: int) -> Result:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return [future.result(60) for future in [pool.submit(guarded, rank) for rank in range(self.size)]]


class Preparing:
    """Rows of the examples whose number fits; those of even ones are cut."""

    def __init__(self, dropped: set[int], failing: int = -1) -> None:
        self.dropped, self.failing, self.count = dropped, failing, 0

    def __call__(self, examples: Sequence[Example]) -> list[TokenizedRow | DataError | None]:
        self.count += len(examples)
        numbers = [int(str(example.prompt)) for example in examples]
        return [
            DataError(f"rows:{n}: bad")
            if n == self.failing
            else None
            if n in self.dropped
            else TokenizedRow(str(n), [n], cut=n % 2 == 0)
            for n in numbers
        ]


def examples(count: int) -> list[Example]:
    return [Example(str(number)) for number in range(count)]


def by_hand(rows: int, dropped: set[int], batch_size: int, seed: int, batches: int, in_order: bool) -> list[Rows]:
    """The batches, from permutations of numpy alone."""
    kept: Rows = []
    epoch = 0
    while len(kept) < batches * batch_size:
        order = np.arange(rows) if in_order else np.random.default_rng([seed, epoch]).permutation(rows)
        kept += [(number, number + rows * epoch) for number in order.tolist() if number not in dropped]
        epoch += 1
    return [kept[batch_size * b :][:batch_size] for b in range(batches)]


def drawn(stream: Any, batches: int) -> list[Rows]:
    found = []
    for _ in range(batches):
        rows = next(stream)
        assert [row.text for row in rows.rows] == [example.prompt for example in rows.examples]
        found.append([(example.row, uid) for example, uid in zip(rows.examples, rows.uids, strict=True)])
    return found


def together(ranks: Sequence[list[Rows]]) -> list[Rows]:
    return [sorted(row for rank in step for row in rank) for step in zip(*ranks, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(3, 40),
    size=st.integers(1, 12),
    ranks=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 3),
    dropped=st.sets(st.integers(0, 39), max_size=30),
    block=st.sampled_from([0, 7, 64]),
    streaming=st.booleans(),
    before=st.integers(0, 8),
)
def test_any_number_of_ranks_has_the_batches_of_one_and_continues_them(
    rows: int, size: int, ranks: int, seed: int, dropped: set[int], block: int, streaming: bool, before: int
) -> None:
    """Over epochs, dropped rows and blocks; a resumed rank has the very rows that it had without the stop."""
    dropped = {number for number in dropped if number < rows - 1}
    source: Any = Lines(examples(rows)) if streaming else examples(rows)
    after = 5
    expected = by_hand(rows, dropped, size, seed, before + after, streaming)
    straight, resumed = Meeting(ranks), Meeting(ranks)
    states: list[str] = [""] * ranks

    def stream(meeting: Meeting, rank: int) -> Stream:
        add_up = meeting.add_up(rank)
        return Stream(source, size, seed, rank, ranks, Preparing(dropped), block, add_up=add_up)

    def whole(rank: int) -> list[Rows]:
        mine = stream(straight, rank)
        first = drawn(mine, before)
        states[rank] = json.dumps(mine.state_dict())
        return first + drawn(mine, after)

    def continued(rank: int) -> list[Rows]:
        mine = stream(resumed, rank)
        mine.load_state_dict(json.loads(states[rank]))
        return drawn(mine, after)

    found = straight.run(whole)
    assert all(len(batch) in (size // ranks, -(-size // ranks)) for rank in found for batch in rank)
    assert together(found) == [sorted(batch) for batch in expected]
    assert len(set(states)) == 1
    state = json.loads(states[0])
    assert state["row"] <= rows
    passed = state["epoch"] * rows + state["row"]
    assert passed - state["dropped"] == before * size
    assert state["truncated"] == sum(number % 2 == 0 for batch in expected[:before] for number, _ in batch)
    assert resumed.run(continued) == [rank[before:] for rank in found]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 30), st.data())
def test_ranks_keep_the_rows_that_they_own_as_far_as_shares_are_equal(
    ranks: int, rows: int, data: st.DataObject
) -> None:
    owners = np.array(data.draw(st.lists(st.integers(0, ranks - 1), min_size=rows, max_size=rows)), np.int64)
    order = assign_ranks(owners, ranks)
    assert sorted(order.tolist()) == list(range(rows))
    moved = fewest = 0
    bounds = rank_bounds(rows, ranks).tolist()
    assert bounds[1] - bounds[0] == -(-rows // ranks), "the first rank, which writes samples, has a row if any has"
    for rank in range(ranks):
        mine = order[bounds[rank] : bounds[rank + 1]]
        assert len(mine) in (rows // ranks, -(-rows // ranks))
        assert mine.tolist() == sorted(mine.tolist())
        moved += int((owners[mine] != rank).sum())
        fewest += max(0, int((owners == rank).sum()) - len(mine))
    assert moved == fewest


@pytest.mark.parametrize("share", [1, 8])
def test_a_rank_prepares_no_more_rows_than_it_would_alone(share: int) -> None:
    """Whatever the number of ranks: its share, what is dropped of it, and what it takes over; here 5 % are dropped."""
    counts, steps, dropped = {}, 40, set(range(0, 2000, 20))
    for ranks in (1, 4, 8):
        meeting = Meeting(ranks)
        preparing = [Preparing(dropped) for _ in range(ranks)]

        def work(rank: int, meeting: Meeting = meeting, preparing: list[Preparing] = preparing) -> None:
            size = share * meeting.size
            add_up = meeting.add_up(rank)
            stream = Stream(examples(2000), size, 0, rank, meeting.size, preparing[rank], add_up=add_up)
            drawn(stream, steps)

        meeting.run(work)
        counts[ranks] = max(each.count for each in preparing)
        if ranks > 1:
            assert meeting.sums <= steps / 8 + 2  # eight batches are agreed on at once
    assert counts[1] <= share * (steps + 3) * 1.2
    assert max(counts.values()) <= 1.2 * counts[1] + 8 * share  # a chunk of eight batches may just have begun


@pytest.mark.parametrize("failing", [0, 5, 9])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_rank_raises_what_is_wrong_with_a_row_when_its_turn_comes(failing: int, streaming: bool) -> None:
    meeting, source = Meeting(2), examples(10)
    alone = Stream(source, 2, 1)
    order = list(range(10)) if streaming else [example.row for _ in range(5) for example in next(alone).examples]

    def work(rank: int) -> tuple[int, str]:
        rows: Any = Lines(source) if streaming else source
        stream = Stream(rows, 2, 1, rank, 2, Preparing(set(), failing), add_up=meeting.add_up(rank))
        for step in range(10):
            try:
                next(stream)
            except DataError as error:
                with pytest.raises(DataError, match=str(error)):  # and to whoever asks again
                    next(stream)
                return step, str(error)
        raise AssertionError("no error")

    assert meeting.run(work) == [(order.index(failing) // 2, f"rows:{failing}: bad")] * 2


def test_data_without_a_usable_row_ends_every_rank() -> None:
    meeting = Meeting(2)

    def work(rank: int) -> str:
        stream = Stream(examples(10), 4, 0, rank, 2, Preparing(set(range(10))), add_up=meeting.add_up(rank))
        with pytest.raises(UsageError) as caught:
            next(stream)
        return str(caught.value)

    assert all(said.startswith("none of the 10 rows can be used") for said in meeting.run(work))


class Counting:
    """A reader with a state: rows from where it is."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Example]:
        while self.place < 30:
            self.place += 1
            yield Example(str(self.place - 1))
        self.place = 0


def test_the_state_of_a_reader_is_that_of_the_last_row_drawn_on_any_number_of_ranks() -> None:
    def work(meeting: Meeting, rank: int) -> list[Any]:
        reader = Counting()
        stream = Stream(
            reader,
            4,
            rank=rank,
            world_size=meeting.size,
            prepare=Preparing({0, 3, 4, 5, 11}),
            readers=lambda: {"data": {"place": reader.place}},
            add_up=meeting.add_up(rank),
        )
        ahead = Prefetcher(stream)
        found = [(drawn(ahead, 1)[0], ahead.state_dict()) for _ in range(9)]
        ahead.close()
        return found

    alone = Meeting(1).run(lambda rank: work(Meeting(1), rank))[0]
    assert alone[0] == ([(1, 1), (2, 2), (6, 6), (7, 7)], alone[0][1])
    assert alone[0][1]["readers"] == {"data": {"place": 8}}
    for size in (2, 4):
        meeting = Meeting(size)
        ranks = meeting.run(lambda rank, meeting=meeting: work(meeting, rank))
        for step, (rows, state) in enumerate(alone):
            assert sorted(row for rank in ranks for row in rank[step][0]) == sorted(rows)
            assert all(rank[step][1] == state for rank in ranks)


@dataclass(frozen=True)
class LastBest(Sampler):
    """Draws on from the row that scored best in the last update."""

    lookahead: int = 0
    """batches"""


class Places:
    """Row numbers count up from `place`, which an update moves to the best row."""

    def __init__(self, place: int = 0) -> None:
        self.place = place

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            number, self.place = self.place % rows, self.place + 1
            yield number

    def update(self, row_N: torch.Tensor, scores_N: torch.Tensor) -> None:
        self.place = int(row_N[scores_N.argmax()])


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_sampler_that_reacts_draws_the_same_rows_for_any_number_of_ranks(lookahead: int) -> None:
    """Resumed, too: a checkpoint holds the rows of all ranks that were drawn ahead."""
    score = lambda number: number * 7 % 10 / 10

    def open_stream(meeting: Meeting, rank: int, engine: Places) -> Prefetcher:
        stream = Stream(
            examples(10),
            4,
            rank=rank,
            world_size=meeting.size,
            prepare=Preparing({3, 4}),
            sampler=LastBest(lookahead),
            engine=engine,
            add_up=meeting.add_up(rank),
        )
        return Prefetcher(stream, update=engine.update)

    def follow(ahead: Prefetcher, engine: Places, steps: int, everyone: Callable[[list[int]], list[int]]) -> list[Rows]:
        found = []
        for _ in range(steps):
            found.append(drawn(ahead, 1)[0])
            row_N = everyone([number for number, _ in found[-1]])
            ahead.update(torch.tensor(row_N), torch.tensor([score(number) for number in row_N]))
        return found

    def work(meeting: Meeting, rank: int) -> tuple[list[Rows], list[Rows]]:
        def everyone(mine: list[int]) -> list[int]:
            """The rows of all ranks, in one order."""
            counts = np.bincount(mine, minlength=10).astype(float)
            return np.repeat(np.arange(10), meeting.add_up(rank)(counts).astype(int)).tolist()

        engine = Places()
        straight = open_stream(meeting, rank, engine)
        found = follow(straight, engine, 4, everyone)
        place, position = engine.place, json.loads(json.dumps(straight.with_ahead(straight.state_dict())))
        assert len(position["ahead"]) == lookahead
        found += follow(straight, engine, 4, everyone)
        engine = Places(place)
        resumed = open_stream(meeting, rank, engine)
        resumed.load_state_dict(position)
        again = follow(resumed, engine, 4, everyone)
        for each in (straight, resumed):
            each.close()
        return found, again

    (alone, _), *_ = Meeting(1).run(lambda rank: work(Meeting(1), rank))
    for size in (1, 2, 4):
        meeting = Meeting(size)
        ranks = meeting.run(lambda rank, meeting=meeting: work(meeting, rank))
        assert together([found for found, _ in ranks]) == [sorted(batch) for batch in alone]
        assert all(found[4:] == again for found, again in ranks)
