"""A pass over rows that can only be read in order, through a buffer that shuffles them, which continues where another stopped.

A source that can begin in its middle is `Resumable`: its reader knows its place, and hands on rows as the source has them. What
waits in the buffer then goes into the state, so that nothing is read again. Any other source is read from its start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rlhf_core.contract.batch import Example

__all__ = ["Place", "Reading", "Resumable", "RowReader", "SkippingReader", "example_of", "read_from"]

MOST = 2**26
"""Bytes of a state; a larger one is left out, and its rows are read again."""


class RowReader(Protocol):
    """Rows of a source in order, as the source has them: what JSON can hold, if the pass is to be continued."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def state(self) -> Any:
        """Return what `Resumable.read` continues from: plain data that JSON can hold."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """Rows that are read in order and can begin in their middle."""

    def read(self, state: Any = None) -> RowReader:
        """Return a reader from the start, or from where another one was."""
        ...

    def example(self, row: Any) -> Example:
        """Return the example in a row that a reader gave."""
        ...


class SkippingReader:
    """A reader of any iterable, which passes over the rows before its place.

    Args:
        rows: what can be read again.
        state: of another one.
    """

    def __init__(self, rows: Iterable[Any], state: Any = None) -> None:
        self._row: int = state or 0
        self._rows = islice(rows, self._row, None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row = next(self._rows)
        self._row += 1
        return row

    def state(self) -> Any:
        return self._row


def read_from(rows: Iterable[Example], state: Any = None) -> RowReader:
    """Return a reader of rows that are `Resumable` or not; the latter are read from their start."""
    return rows.read(state) if isinstance(rows, Resumable) else SkippingReader(rows, state)


def example_of(rows: Iterable[Example], row: Any) -> Example:
    """Return the example in a row that `read_from` gave."""
    return rows.example(row) if isinstance(rows, Resumable) else row


class Place:
    """A moment of a pass, which becomes plain data when it is needed."""

    def __init__(self, given: int, reader: Any, **kept: Any) -> None:
        self.given = given
        """rows that the pass gave until then"""
        self._state = {"given": given, "reader": reader, **kept}

    def plain(self) -> dict[str, Any] | None:
        """Return the state of the pass as plain data; None if JSON cannot hold it, or it is too large."""
        try:
            text = json.dumps(self._state)
        except (TypeError, ValueError):
            return None
        return json.loads(text) if len(text) <= MOST else None


class Reading:
    """Yields (number, row) of one pass; `example_of` makes the row an example.

    Args:
        examples: the source.
        buffer: rows to shuffle within: each that comes in pushes a random one out, and the last ones leave in random order.
        seed: of the shuffling, and the epoch.
        state: the plain data of a `Place`; from the start without it.
    """

    def __init__(
        self, examples: Iterable[Example], buffer: int, seed: tuple[int, int], state: Mapping[str, Any] | None = None
    ) -> None:
        self._resumable = isinstance(examples, Resumable)
        self.given = 0
        self._read = 0
        self._size = buffer
        self._buffer: list[tuple[int, Any]] = []
        self._rest: list[int] | None = None
        self._generator = np.random.default_rng(seed)
        if state is not None:
            self.given, self._read, self._rest = state["given"], state["read"], state["rest"]
            self._buffer = [(number, row) for number, row in state["buffer"]]
            self._generator.bit_generator.state = state["random"]
        self._rows = read_from(examples, None if state is None else state["reader"])

    def place(self) -> Place | None:
        """Return the present moment; None if the source cannot begin there."""
        if not self._resumable:
            return None
        random = copy(self._generator.bit_generator.state)
        kept = {"read": self._read, "buffer": list(self._buffer), "rest": copy(self._rest), "random": random}
        return Place(self.given, self._rows.state(), **kept)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        found = self._next()
        self.given += 1
        return found

    def _next(self) -> tuple[int, Any]:
        if self._rest is None:
            while self._read < self._size and len(self._buffer) < self._size:
                first = list(islice(self._rows, self._size - len(self._buffer)))
                if not first:
                    break
                self._buffer += enumerate(first, self._read)
                self._read += len(first)
            for row in self._rows:
                coming = (self._read, row)
                self._read += 1
                if not self._size:
                    return coming
                at = int(self._generator.integers(self._size))
                going, self._buffer[at] = self._buffer[at], coming
                return going
            self._rest = self._generator.permutation(len(self._buffer)).tolist()[::-1]
        if not self._rest:
            raise StopIteration
        return self._buffer[self._rest.pop()]
