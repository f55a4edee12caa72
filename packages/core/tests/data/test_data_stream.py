"""The stream is endless, shuffled, the same for any number of ranks, and continues where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contract.batch import Example
from rlhf_core.data.rows import TokenizedRow
from rlhf_core.data.stream import Stream
from rlhf_core.errors import DataError, UsageError

ROWS = [Example(str(i)) for i in range(10)]


class Lines:
    """Rows that can only be read in order."""

    def __init__(self, rows: list[Example]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)


def keeping(fits: Callable[[int], bool]) -> Callable[[Sequence[Example]], list[TokenizedRow | DataError | None]]:
    """Rows of the examples whose number `fits`; those of even ones are cut."""

    def prepare(examples: Sequence[Example]) -> list[TokenizedRow | DataError | None]:
        numbers = [int(str(example.prompt)) for example in examples]
        return [TokenizedRow(str(n), [n], cut=n % 2 == 0) if fits(n) else None for n in numbers]

    return prepare


def prompts(stream: Stream, batches: int) -> list[list[str]]:
    return [[str(example.prompt) for example in next(stream)[0]] for _ in range(batches)]


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    flat = [p for batch in prompts(Stream(ROWS, 4, seed=1), 5) for p in batch]
    first, second = flat[:10], flat[10:]
    assert sorted(first) == sorted(second) == [str(i) for i in range(10)]
    assert first != second
    assert first != [str(i) for i in range(10)]


def test_another_seed_is_another_order_and_the_same_seed_the_same() -> None:
    assert prompts(Stream(ROWS, 10, seed=1), 3) == prompts(Stream(ROWS, 10, seed=1), 3)
    assert prompts(Stream(ROWS, 10, seed=1), 3) != prompts(Stream(ROWS, 10, seed=2), 3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch_of_one_process(world_size: int) -> None:
    ranks = [Stream(ROWS, 4, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    shared = [prompts(rank, 6) for rank in ranks]
    joined = [list(chain(*(rank[step] for rank in shared))) for step in range(6)]
    assert joined == prompts(Stream(ROWS, 4, seed=3), 6)


@pytest.mark.parametrize(("batch", "world_size"), [(4, 3), (5, 2), (2, 3), (1, 4)])
def test_ranks_that_do_not_divide_a_batch_differ_by_one_row(batch: int, world_size: int) -> None:
    ranks = [Stream(ROWS, batch, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = [[next(rank).examples for rank in ranks] for _ in range(7)]
    for step in steps:
        counts = [len(share) for share in step]
        assert max(counts) - min(counts) == 1
        assert sum(counts) == batch
    joined = [[example.prompt for share in step for example in share] for step in steps]
    assert joined == prompts(Stream(ROWS, batch, seed=3), 7)


def test_a_uid_is_row_number_plus_rows_times_epoch_and_never_comes_twice() -> None:
    stream = Stream(ROWS, 5, seed=0)
    for epoch in range(3):
        for _ in range(2):
            examples, uids, _ = next(stream)
            assert uids == [int(str(example.prompt)) + 10 * epoch for example in examples]


@given(st.integers(0, 30), st.integers(1, 7), st.booleans(), st.sampled_from([0, 4, 64]))
def test_a_stream_continues_where_another_stopped(before: int, batch_size: int, streaming: bool, block: int) -> None:
    rows = Lines(ROWS) if streaming else ROWS
    prepare = keeping(lambda number: number not in (3, 4))
    whole = Stream(rows, batch_size, seed=5, prepare=prepare, block=block, buffer=3)
    for _ in range(before):
        next(whole)
    resumed = Stream(rows, batch_size, seed=5, prepare=prepare, buffer=3)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [next(resumed) for _ in range(7)] == [next(whole) for _ in range(7)]
    assert resumed.state_dict() == whole.state_dict()


def test_rows_that_are_not_kept_are_counted_and_batches_stay_full() -> None:
    stream = Stream(ROWS, 4, prepare=keeping(lambda number: number >= 5))
    drawn = prompts(stream, 5)
    assert all(len(batch) == 4 for batch in drawn)
    assert Counter(chain(*drawn)) == {str(i): 4 for i in range(5, 10)}
    assert stream.dropped in range(15, 21)  # 3 whole epochs, and what the fourth has met so far
    assert stream.truncated == 4 * 2  # 6 and 8
    examples, _, rows = next(stream)
    assert [row.text for row in rows or ()] == [example.prompt for example in examples]


def test_data_without_usable_rows_is_an_error_and_not_an_endless_search() -> None:
    with pytest.raises(UsageError, match="none of the 10 rows can be used"):
        next(Stream(ROWS, 4, prepare=keeping(lambda _: False)))
    with pytest.raises(UsageError, match="the data has no rows"):
        next(Stream([], 4))


def test_rows_that_can_be_read_only_once_end_with_advice() -> None:
    stream = Stream(iter(ROWS), 10)
    next(stream)
    with pytest.raises(UsageError, match=r"no rows when read again for epoch 2; give a sequence"):
        next(stream)


def test_streamed_rows_come_in_their_own_order() -> None:
    assert prompts(Stream(Lines(ROWS), 6), 2) == [["0", "1", "2", "3", "4", "5"], ["6", "7", "8", "9", "0", "1"]]


def test_a_buffer_shuffles_what_can_only_be_read_in_order_anew_each_epoch() -> None:
    rows = [Example(str(i)) for i in range(200)]
    flat = [int(p) for batch in prompts(Stream(Lines(rows), 10, seed=1, buffer=50), 40) for p in batch]
    first, second = flat[:200], flat[200:]
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second
    assert flat == [int(p) for batch in prompts(Stream(Lines(rows), 10, seed=1, buffer=50), 40) for p in batch]
    assert all(row < place + 50 for place, row in enumerate(first))  # nothing comes before the buffer has read it
    distance = sum(abs(row - place) for place, row in enumerate(first)) / 200
    assert 25 < distance < 60  # a row stays in the buffer for 50 others on average


def test_an_error_is_raised_when_its_row_comes_and_not_before() -> None:
    """However many rows are prepared at a time."""

    def prepare(examples: Sequence[Example]) -> list[TokenizedRow | DataError | None]:
        return [DataError("rows:8: bad") if e.prompt == "7" else TokenizedRow(str(e.prompt), [1]) for e in examples]

    stream = Stream(Lines(ROWS), 2, prepare=prepare, block=64)
    assert prompts(stream, 3) == [["0", "1"], ["2", "3"], ["4", "5"]]
    with pytest.raises(DataError, match="rows:8: bad"):
        next(stream)
