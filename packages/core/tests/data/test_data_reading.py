"""A pass over rows that are read in order continues in its middle, with the buffer that it had, and reads nothing again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.contract.batch import Example
from rlhf_core.data.hf import HuggingFaceData
from rlhf_core.data.mixture import limit_rows
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.reading import Reading, SkippingReader
from rlhf_core.data.stream import Stream


class Numbers:
    """Rows that can begin in their middle, and count how many are read."""

    def __init__(self, rows: int, wrap: Any = None) -> None:
        self.rows, self.wrap, self.count = rows, wrap, 0

    def __iter__(self) -> Iterator[Example]:
        return map(self.example, self.read())

    def read(self, state: Any = None) -> Any:
        source = self

        class Reader(SkippingReader):
            def __next__(self) -> Any:
                source.count += 1
                number = super().__next__()
                return number if source.wrap is None else [number, source.wrap]

        return Reader(range(self.rows), state)

    def example(self, row: Any) -> Example:
        return Example(str(row if self.wrap is None else row[0]))


def shuffled_by_hand(rows: int, size: int, seed: int, epoch: int) -> list[int]:
    """Each row that comes in pushes a random one out of the buffer; the last ones leave in random order."""
    if not size:
        return list(range(rows))
    generator = np.random.default_rng([seed, epoch])
    buffer, found = list(range(min(size, rows))), []
    for row in range(size, rows):
        at = int(generator.integers(size))
        found.append(buffer[at])
        buffer[at] = row
    return found + [buffer[at] for at in generator.permutation(len(buffer))]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    size=st.sampled_from([0, 1, 4, 25, 80]),
    batch_size=st.integers(1, 7),
    before=st.integers(0, 25),
    seed=st.integers(0, 3),
)
def test_a_stream_continues_in_its_middle_exactly_and_reads_no_row_again(
    rows: int, size: int, batch_size: int, before: int, seed: int
) -> None:
    expected = [n for epoch in range(200 // rows + 3) for n in shuffled_by_hand(rows, size, seed, epoch)]
    straight = Prefetcher(Stream(Numbers(rows), batch_size, seed, buffer=size))
    drawn = lambda stream, count: [int(str(e.prompt)) for _ in range(count) for e in next(stream).examples]
    assert drawn(straight, before) == expected[: before * batch_size]
    position = json.loads(json.dumps(straight.with_ahead(straight.state_dict())))
    straight.close()
    source = Numbers(rows)
    resumed = Prefetcher(Stream(source, batch_size, seed, buffer=size))
    resumed.load_state_dict(position)
    again = json.loads(json.dumps(resumed.with_ahead(resumed.state_dict())))
    assert again == position  # a save before the first batch loses nothing
    assert drawn(resumed, 5) == expected[before * batch_size :][: 5 * batch_size]
    resumed.close()
    counted = Numbers(rows)
    once = Stream(counted, batch_size, seed, buffer=size)
    once.load_state_dict(position)
    next(once)
    if "reading" in position and position["row"] + 3 * batch_size < rows - size:  # the pass does not end
        assert counted.count <= 3 * batch_size


def test_what_json_cannot_hold_is_read_again_up_to_the_place() -> None:
    """The rows are the same ones, only slower."""
    dates = Numbers(50, wrap=datetime.date(2026, 1, 1))
    stream = Prefetcher(Stream(dates, 4, 1, buffer=10))
    for _ in range(5):
        next(stream)
    position = stream.with_ahead(stream.state_dict())
    assert position["reading"] is None
    expected = [next(stream).uids for _ in range(3)]
    stream.close()
    resumed = Stream(Numbers(50, wrap=datetime.date(2026, 1, 1)), 4, 1, buffer=10)
    resumed.load_state_dict(json.loads(json.dumps(position)))
    assert [next(resumed).uids for _ in range(3)] == expected


def test_a_place_is_of_its_moment() -> None:
    reading = Reading(Numbers(30), 5, (0, 0))
    first = list(islice(reading, 7))
    place = reading.place()
    rest = list(reading)
    assert place is not None
    assert list(Reading(Numbers(30), 5, (0, 0), place.plain())) == rest
    assert sorted(number for number, _ in first + rest) == list(range(30))


def shards(folder: Path, rows: Sequence[int]) -> list[str]:
    """A file of rows for each number, by the name of its rows."""
    names = []
    for shard, count in enumerate(rows):
        path = folder / f"{shard}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{shard}/{n}"}) + "\n" for n in range(count)))
        names.append(str(path))
    return names


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle_buffer": 6},
        {"shuffle_buffer": 0},
        {"shares": (0.7, 0.3), "shuffle_buffer": 3},
        {"limit": 20, "shuffle_buffer": 4},
        {"limit_each": 9, "shuffle_buffer": 4},
    ],
)
@pytest.mark.parametrize("before", [1, 4, 11])
def test_streamed_sets_continue_exactly(tmp_path: Path, options: dict[str, Any], before: int) -> None:
    pytest.importorskip("datasets")
    data = HuggingFaceData(",".join(shards(tmp_path, [17, 12])), streaming=True, **options)
    drawn = lambda stream, count: [e.prompt for _ in range(count) for e in next(stream).examples]
    straight = Prefetcher(Stream(data("train"), 3, 2, buffer=data.shuffle_buffer))
    first = drawn(straight, before)
    position = json.loads(json.dumps(straight.with_ahead(straight.state_dict())))
    expected = drawn(straight, 9)
    straight.close()
    resumed = Stream(data("train"), 3, 2, buffer=data.shuffle_buffer)
    resumed.load_state_dict(position)
    assert drawn(resumed, 9) == expected
    replayed = Stream(data("train"), 3, 2, buffer=data.shuffle_buffer)
    replayed.load_state_dict({name: value for name, value in position.items() if name != "reading"})
    assert drawn(replayed, 9) == expected  # as checkpoints had it before
    assert first


def test_first_rows_continue_and_end(tmp_path: Path) -> None:
    rows: Any = limit_rows(Numbers(10), 6)
    reader = rows.read()
    assert list(islice(reader, 4)) == [0, 1, 2, 3]
    assert list(rows.read(reader.state())) == [4, 5]
    assert [example.prompt for example in rows] == ["0", "1", "2", "3", "4", "5"]
