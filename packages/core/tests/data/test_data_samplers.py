"""Samplers order the rows of a stream: reacting ones row by row, no further ahead than they say, and exactly after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rlhf_core.contract.batch import Example
from rlhf_core.contract.selection import Sampler
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.rows import TokenizedRow
from rlhf_core.data.shuffling import ShuffledSampler
from rlhf_core.data.stream import Stream
from rlhf_core.errors import ContractError, DataError, UsageError

ROWS = [Example(str(i)) for i in range(10)]


@dataclass(frozen=True)
class LastBest(Sampler):
    """Draws on from the row that scored best in the last update."""

    lookahead: int = 0
    """batches"""

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        raise NotImplementedError


class Engine:
    """Row numbers count up from `place`, which an update moves to the best row."""

    def __init__(self) -> None:
        self.place = 0

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            number, self.place = self.place % rows, self.place + 1
            yield number

    def update(self, row_N: torch.Tensor, scores_N: torch.Tensor) -> None:
        self.place = int(row_N[scores_N.argmax()])


@dataclass(frozen=True)
class Fixed(Sampler):
    """Gives these numbers."""

    numbers: tuple[Any, ...] = (0,)
    """row numbers"""
    reacts: ClassVar[bool] = False

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        return iter(self.numbers)


def prepare(examples: Sequence[Example]) -> list[TokenizedRow | DataError | None]:
    """Rows 3 and 4 are too long."""
    return [None if e.prompt in ("3", "4") else TokenizedRow(str(e.prompt), [1]) for e in examples]


def test_the_usual_sampler_is_a_new_permutation_per_epoch() -> None:
    """Drawn from (seed, epoch) by numpy, as streams drew before there were samplers."""
    epochs = [np.random.default_rng([1, epoch]).permutation(10).tolist() for epoch in range(3)]
    numbers = ShuffledSampler()(10, 1)
    assert [[next(numbers) for _ in range(10)] for _ in range(3)] == epochs
    stream = Stream(ROWS, 5, seed=1)
    drawn = [example for _ in range(6) for example in next(stream).examples]
    assert [example.row for example in drawn] == [number for epoch in epochs for number in epoch]
    assert all(str(example.row) == example.prompt for example in drawn)


def test_rows_that_are_read_in_order_carry_their_place() -> None:
    class Lines:
        def __iter__(self) -> Iterator[Example]:
            return iter(ROWS[:3])

    stream = Stream(Lines(), 2)
    assert [example.row for _ in range(3) for example in next(stream).examples] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UsageError, match="sampler.* Fixed chooses rows by number, but the data is a stream without"):
        Stream(Lines(), 2, sampler=Fixed())


def test_a_number_of_a_row_that_is_called_like_one_of_cores_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: a numeric column cannot be called 'row' or 'uids'"):
        Example("x", fields={"row": 1.0}, origin="rows.jsonl:3")


def test_a_sampler_that_does_not_react_continues_behind_the_numbers_it_gave() -> None:
    numbers = (5, 5, 0, 9, 1, 2, 5, 7)
    whole = Stream(ROWS, 2, sampler=Fixed(numbers))
    assert [next(whole).uids for _ in range(2)] == [[0, 1], [2, 3]], "no uid comes twice, though a row does"
    resumed = Stream(ROWS, 2, sampler=Fixed(numbers))
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [example.row for _ in range(2) for example in next(resumed).examples] == [1, 2, 5, 7]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 10), r"sampler Fixed of .*test_data_samplers returned 10, which is not a row number from 0 to 9"),
        ((0, -1), r"returned -1, which is not a row number"),
        ((0, "1"), r"returned '1', which is not a row number"),
        ((0,), r"sampler Fixed .* ran out of rows; its iterator must be endless"),
    ],
)
def test_a_sampler_that_gives_no_row_is_named(numbers: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        next(Stream(ROWS, 2, sampler=Fixed(numbers)))


def follow(ahead: Prefetcher, scores: Mapping[int, float], steps: int) -> list[list[int]]:
    """The rows of some steps; after each, the sampler gets the scores of its rows."""
    found = []
    for _ in range(steps):
        row_N = torch.tensor([example.row for example in next(ahead).examples])
        ahead.update(row_N, torch.tensor([scores.get(number, 0.0) for number in row_N.tolist()]))
        found.append(row_N.tolist())
    return found


@pytest.fixture
def streams() -> Iterator[Any]:
    opened: list[Prefetcher] = []

    def open_stream(lookahead: int, engine: Engine) -> Prefetcher:
        stream = Stream(ROWS, 2, prepare=prepare, block=64, sampler=LastBest(lookahead), engine=engine)
        opened.append(Prefetcher(stream, update=engine.update))
        return opened[-1]

    yield open_stream
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    ("lookahead", "expected"),
    [
        (0, [[0, 1], [1, 2], [2, 5], [5, 6]]),  # rows 3 and 4 are too long, and nothing is drawn behind the last row
        (1, [[0, 1], [2, 5], [1, 2], [5, 6]]),
        (2, [[0, 1], [2, 5], [6, 7], [1, 2]]),
    ],
)
def test_rows_are_drawn_no_further_ahead_than_the_sampler_says(
    streams: Any, lookahead: int, expected: list[list[int]]
) -> None:
    """By hand: each step goes on from its best row, the later one, as many steps later as batches are drawn ahead."""
    scores = {number: number / 10 for number in range(10)}
    assert follow(streams(lookahead, Engine()), scores, 4) == expected


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_a_checkpoint_holds_what_was_drawn_ahead(streams: Any, lookahead: int) -> None:
    scores = {number: number * 7 % 10 / 10 for number in range(10)}
    straight = streams(lookahead, Engine())
    expected = follow(straight, scores, 9)
    engine = Engine()
    begun = streams(lookahead, engine)
    first = follow(begun, scores, 4)
    position = json.loads(json.dumps(begun.with_ahead(begun.state_dict())))
    assert len(position["ahead"]) == lookahead
    again = Engine()
    again.place = engine.place
    resumed = streams(lookahead, again)
    resumed.load_state_dict(position)
    assert resumed.metrics() == begun.metrics()
    assert first + follow(resumed, scores, 5) == expected
    assert resumed.state_dict() == straight.state_dict()
