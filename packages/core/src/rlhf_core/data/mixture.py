"""Several sets of rows as one: one after another, or drawn by chance until every set has been used up.

Drawing is reproducible: which set comes next depends on the seed, the shares and how many rows each set has, and on
nothing else. A set that is used up starts again while others are not, so small sets are seen more than once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.data.reading import RowReader, example_of, read_from
from rlhf_core.errors import OptionError

__all__ = ["PickedRows", "SetsReader", "concatenate", "count_duplicates", "drop_duplicates", "limit_rows", "order"]

DRAWS = 4096
"""Random numbers drawn at a time."""


class PickedRows(Sequence[Example]):
    """Rows of several sets in a given order; a row is made when it is asked for.

    Args:
        sets: the sets.
        set_N: which set each row comes from.
        row_N: and which of its rows it is.
        duplicates: rows that were left out because they came before; those of `sets` are added.
    """

    def __init__(
        self, sets: Sequence[Sequence[Example]], set_N: np.ndarray, row_N: np.ndarray, duplicates: int = 0
    ) -> None:
        self._sets, self._set_N, self._row_N = sets, set_N, row_N
        self.duplicates: int = duplicates + sum(map(count_duplicates, sets))

    @classmethod
    def select(cls, rows: Sequence[Example], index: Sequence[int] | np.ndarray, duplicates: int = 0) -> PickedRows:
        """Some rows of one set."""
        return cls([rows], np.zeros(len(index), np.int16), np.asarray(index, int), duplicates)

    def __len__(self) -> int:
        return len(self._row_N)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> PickedRows: ...
    def __getitem__(self, index: int | slice) -> Example | PickedRows:
        if isinstance(index, slice):
            own = self.duplicates - sum(map(count_duplicates, self._sets))
            return PickedRows(self._sets, self._set_N[index], self._row_N[index], own)
        return self._sets[int(self._set_N[index])][int(self._row_N[index])]


def count_duplicates(rows: Iterable[Example]) -> int:
    """Return how many rows were left out because they came before."""
    return rows.duplicates if isinstance(rows, PickedRows) else 0


def concatenate(sets: Sequence[Sequence[Example]]) -> PickedRows:
    """All rows of the first set, then all of the second, and so on."""
    set_N = np.concatenate([np.full(len(rows), number) for number, rows in enumerate(sets)])
    return PickedRows(sets, set_N, np.concatenate([np.arange(len(rows)) for rows in sets]))


def drop_duplicates(rows: Sequence[Example], seen: set[bytes]) -> PickedRows:
    """The rows whose prompt and completions are not in `seen`; theirs are added to it."""
    first: list[int] = []
    for number, example in enumerate(rows):
        content = hashlib.blake2b(repr((example.prompt, example.completions)).encode(), digest_size=16).digest()
        if content not in seen:
            seen.add(content)
            first.append(number)
    return PickedRows.select(rows, first, len(rows) - len(first))


def order(lengths: Sequence[int], shares: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(set, row) of each draw until every set has been used up at least once."""
    drawn_from: list[int] = []
    rows: list[int] = []
    count = [0] * len(lengths)
    left = set(range(len(lengths)))
    for number in _draw_set_numbers(shares, seed):
        drawn_from.append(number)
        rows.append(count[number] % lengths[number])
        count[number] += 1
        if count[number] == lengths[number]:
            left.discard(number)
            if not left:
                break
    return np.array(drawn_from), np.array(rows)


class SetsReader:
    """Yields (set, row) of sets whose lengths are not known: one after another, or the draws of `order`.

    A set's end shows when it is asked again.

    Args:
        sets: the sets.
        shares: probability of each; without them one set follows another.
        seed: of the draws.
        state: of another reader, to continue from.
    """

    def __init__(
        self, sets: Sequence[Iterable[Example]], shares: Sequence[float], seed: int, state: Any = None
    ) -> None:
        self._sets, self._shares = sets, shares
        self._draws: int = state["draws"] if state else 0
        self._left = set(state["left"] if state else range(len(sets)))
        states = state["readers"] if state else [None] * len(sets)
        self._readers = [read_from(rows, each) for rows, each in zip(sets, states, strict=True)]
        self._numbers = islice(_draw_set_numbers(shares, seed), self._draws, None) if shares else None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        while self._left:
            number = min(self._left) if self._numbers is None else next(self._numbers)
            self._draws += 1
            for row in self._readers[number]:
                return number, row
            self._left.discard(number)
            if self._shares and self._left:
                self._readers[number] = read_from(self._sets[number])
                return number, next(self._readers[number])
        raise StopIteration

    def state(self) -> Any:
        """Return the state from which another reader continues."""
        return {"draws": self._draws, "left": sorted(self._left), "readers": [each.state() for each in self._readers]}


def _draw_set_numbers(shares: Sequence[float], seed: int) -> Iterator[int]:
    """Set numbers, endlessly."""
    if any(share <= 0 for share in shares):
        raise OptionError("shares", f"{' '.join(f'{share:g}' for share in shares)}: each should be above 0")
    probabilities = np.array(shares) / sum(shares)
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.choice(len(shares), DRAWS, p=probabilities).tolist()


def limit_rows(rows: Iterable[Example], limit: int) -> Iterable[Example]:
    """The first `limit` rows; all for 0."""
    if not limit:
        return rows
    return rows[:limit] if isinstance(rows, Sequence) else _First(rows, limit)


class _First(Iterable[Example]):
    """The first rows of something that can be read again."""

    def __init__(self, rows: Iterable[Example], limit: int) -> None:
        self._rows, self._limit = rows, limit

    def __iter__(self) -> Iterator[Example]:
        return islice(self._rows, self._limit)

    def read(self, state: Any = None) -> RowReader:
        """Return a reader of the rows, from where another one was."""
        return _FirstReader(self._rows, self._limit, state)

    def example(self, row: Any) -> Example:
        """Return the example in what a reader gave."""
        return example_of(self._rows, row)


class _FirstReader:
    """The first rows of another reader."""

    def __init__(self, rows: Iterable[Example], limit: int, state: Any) -> None:
        self._left: int = limit if state is None else state["left"]
        self._reader = read_from(rows, None if state is None else state["reader"])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._left:
            raise StopIteration
        self._left -= 1
        return next(self._reader)

    def state(self) -> Any:
        return {"left": self._left, "reader": self._reader.state()}
