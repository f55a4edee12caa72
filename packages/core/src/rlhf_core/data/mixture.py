"""Several sets of rows as one: one after another, or drawn by chance until every set has been used up.

Drawing is reproducible: which set comes next depends on the seed, the shares and how many rows each set has, and on
nothing else. A set that is used up starts again while others are not, so small sets are seen more than once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.errors import OptionError

__all__ = ["PickedRows", "concatenate", "count_duplicates", "draw_from_sets", "drop_duplicates", "limit_rows", "order"]

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
    def select(cls, rows: Sequence[Example], index: Sequence[int], duplicates: int = 0) -> PickedRows:
        """Some rows of one set."""
        return cls([rows], np.zeros(len(index), int), np.array(index, int), duplicates)

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


def draw_from_sets(sets: Sequence[Iterable[Example]], shares: Sequence[float], seed: int) -> Iterator[Example]:
    """The same draws from sets whose lengths are not known. A set's end shows when it is asked again."""
    readers = [iter(rows) for rows in sets]
    left = set(range(len(sets)))
    for number in _draw_set_numbers(shares, seed):
        row = next(readers[number], None)
        if row is None:
            left.discard(number)
            if not left:
                return
            readers[number] = iter(sets[number])
            row = next(readers[number])
        yield row


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
