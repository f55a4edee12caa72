"""The sequence of rows that all ranks draw: numbers that a sampler gives, or rows in the order in which a source is read."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import islice
from typing import Any, TypeGuard

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.contract.selection import Sampler
from rlhf_core.data.chunks import Segment
from rlhf_core.data.reading import Place, Reading, example_of
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.util.random_states import seed_apart, seeded_each

__all__ = ["Draws", "is_indexed"]

ROW, NUMBER = 0, 1
"""Purposes of seeded generators."""
TYPES = {"prompt": "write a text or a tuple of messages", "completions": "write a tuple of texts or chats"}
"""Advice on values of an example."""


class Draws:
    """Rows one after another, epoch after epoch.

    Args:
        examples: a sequence, or any iterable that can be read again.
        seed: of the shuffling.
        sampler: the provider that orders a sequence.
        engine: what it has opened.
        buffer: rows to shuffle a source without a length within.
        stateful: the reader continues from its own state.
        seeds_rows: seed the global random generators before each row is read and each number is chosen.
        reader: name of what gave the examples, for messages.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        seed: int,
        sampler: Sampler,
        engine: Callable[[int, int], Iterator[int]],
        buffer: int,
        stateful: bool,
        seeds_rows: bool = False,
        reader: str = "the data",
    ) -> None:
        self._reader = reader
        self._examples, self._seed, self._sampler, self._engine = examples, seed, sampler, engine
        self._buffer, self._stateful, self._seeds_rows = buffer, stateful, seeds_rows
        self.move(0, 0, 0)

    def move(self, epoch: int, row: int, first_uid: int, reading: Mapping[str, Any] | None = None) -> None:
        """Draw from there on; `reading` is the state of a pass that gave no more than `row` rows."""
        self._epoch, self._row, self._first_uid = epoch, row, first_uid
        self._numbers: Iterator[int] | None = None
        self._reading: Reading | None = None
        self._stateful_rows: Iterator[Example] | None = None
        self._state = reading
        self._moment: Place | None = None

    @property
    def place(self) -> int:
        """Return the number of rows drawn in all epochs."""
        return self._first_uid + self._row

    def segments(self, rows: int) -> tuple[list[Segment], Exception | None]:
        """Return the next rows, and what ended them before there were so many."""
        segments: list[Segment] = []
        while rows:
            number_C, found, failure = self._read(rows)
            if len(number_C):
                segments.append(Segment(self._epoch, self._first_uid, self._row, number_C, found, self._moment))
                rows -= len(number_C)
                self._row += len(number_C)
            elif failure is None and not self._row:
                again = f" when read again for epoch {self._epoch + 1}; give a sequence" if self._epoch else ""
                failure = UsageError(f"the data has no rows{again}")
            elif failure is None:
                self._epoch, self._row, self._first_uid = self._epoch + 1, 0, self._first_uid + self._row
                self._reading = self._stateful_rows = None
            if failure is not None:
                return segments, failure
        return segments, None

    def example_in(self, segment: Segment, at: int) -> Example:
        """Return a row of a segment."""
        number = int(segment.number_C[at])
        if segment.rows is None:
            drawn = segment.first_row + at
            return self.example(number, segment.first_uid + (number if self._sampler.epochs else drawn))
        row = segment.rows[at]
        return self._with_number(row if isinstance(row, Example) else example_of(self._examples, row), number)

    def example(self, number: int, uid: int) -> Example:
        """Return the row of this number, which it carries."""
        examples: Any = self._examples
        if self._seeds_rows:
            seed_apart(self._seed, ROW, uid)
        return self._with_number(examples[number], number)

    def _with_number(self, row: object, number: int) -> Example:
        """Return a row of the reader with its number.

        Raises:
            ContractError: it is no example.
        """
        if not isinstance(row, Example):
            raise ContractError(f"{self._reader} gave {reprlib.repr(row)} as row {number}; write Example(prompt=…)")
        for name, kinds in (("prompt", (str, tuple, list)), ("completions", (tuple, list))):
            if not isinstance(value := getattr(row, name), kinds):
                raise ContractError(f"{self._reader}: {name} of row {number} is {reprlib.repr(value)}; {TYPES[name]}")
        return replace(row, row=number)

    def _read(self, most: int) -> tuple[np.ndarray, list[Any] | None, Exception | None]:
        """Numbers of the next rows of the epoch, with the rows where they are read in order, and what went wrong after them."""
        if is_indexed(self._examples):
            number_C, wrong = self._draw_numbers(len(self._examples), min(most, len(self._examples) - self._row))
            return number_C, None, wrong
        numbers, rows = list[int](), list[Any]()
        failure: Exception | None = None
        try:
            in_order = self._in_order()
            self._moment = self._reading.place() if self._reading is not None and self._row else None
            for number, row in islice(in_order, most):
                numbers.append(number)
                rows.append(row)
        except Exception as error:
            failure = error
        return np.array(numbers, np.int64), rows, failure

    def _in_order(self) -> Iterator[tuple[int, Any]]:
        """(row number, row) of the epoch from the present position on."""
        if self._stateful:
            self._stateful_rows = self._stateful_rows or self._seed_each(lambda: self._examples, ROW, self.place)
            return enumerate(self._stateful_rows, self._row)
        if self._reading is None:
            state = self._state if self._state is not None and self._state["given"] <= self._row else None
            self._state = None
            self._reading = Reading(self._source(), self._buffer, (self._seed, self._epoch), state)
            for _ in islice(self._reading, self._row - self._reading.given):
                pass
        return self._reading

    def _source(self) -> Iterable[Example]:
        """The rows of an epoch; if generators are seeded for each, as an iterator over them from the first on."""
        return self._seed_each(lambda: self._examples, ROW, self._first_uid) if self._seeds_rows else self._examples

    def _seed_each(self, make: Callable[[], Iterable[Any]], purpose: int, first: int) -> Iterator[Any]:
        return seeded_each(make, first, self._seed, purpose) if self._seeds_rows else iter(make())

    def _draw_numbers(self, rows: int, count: int) -> tuple[np.ndarray, Exception | None]:
        """So many numbers that the sampler gives, and a ContractError after them if it gives none, or none of a row."""
        who = f"sampler {type(self._sampler).__qualname__} of {type(self._sampler).__module__}"
        if self._numbers is None:
            first = self.place if self._sampler.reacts else 0  # one that reacts continues from its state
            numbers = self._seed_each(lambda: self._engine(rows, self._seed), NUMBER, first)
            self._numbers = islice(numbers, self.place - first, None)
        given: list[Any] = list(islice(self._numbers, count))
        if not (set(map(type, given)) <= {int} and (not given or 0 <= min(given) <= max(given) < rows)):
            for at, number in enumerate(given):
                if not isinstance(number, (int, np.integer)) or not 0 <= number < rows:
                    wrong = ContractError(f"{who} returned {number!r}, which is not a row number from 0 to {rows - 1}")
                    return np.array(given[:at], np.int64), wrong
        short = ContractError(f"{who} ran out of rows; its iterator must be endless") if len(given) < count else None
        return np.array(given, np.int64), short


def is_indexed(examples: Iterable[Example]) -> TypeGuard[Sequence[Example]]:
    """Return True if rows are read by number."""
    return isinstance(examples, Sequence) or (isinstance(examples, Sized) and hasattr(examples, "__getitem__"))
