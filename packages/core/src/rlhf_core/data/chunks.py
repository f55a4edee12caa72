"""Rows that all ranks draw together, of which each rank prepares its own.

A chunk is a piece of the endless sequence of drawn rows. Every rank draws the same numbers; the owner of a row follows from its
place in the sequence alone, so that it is the same after a resume. The owner prepares the row and finds a code, which ranks add
up: then every rank knows which rows are usable, and that took one number per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_core.contract.batch import Example

if TYPE_CHECKING:
    from rlhf_core.data.reading import Place
    from rlhf_core.data.rows import TokenizedRow

__all__ = ["CUT", "DROPPED", "FAILED", "USABLE", "Chunk", "PreparedRow", "Segment", "assign_ranks", "rank_bounds"]

DROPPED, USABLE, CUT, FAILED = range(4)
"""Codes of rows: passed over, usable, usable after a cut, one that ends the run."""


class PreparedRow(NamedTuple):
    """A row of data on its way into a batch."""

    example: Example
    uid: int
    tokens: TokenizedRow | None
    """the example tokenized, if rows are prepared"""


@dataclass
class Segment:
    """Rows of one epoch, in the order of drawing."""

    epoch: int
    first_uid: int
    """rows of all epochs before"""
    first_row: int
    """rows of this epoch before"""
    number_C: np.ndarray
    """int64 row numbers"""
    rows: Sequence[Any] | None = None
    """the rows as the source has them, if it is read in order"""
    moment: Place | None = None
    """the pass over such a source before these rows; None at its start, and if the source cannot begin there"""

    def __len__(self) -> int:
        return len(self.number_C)


@dataclass
class Chunk:
    """C rows that follow one another in the sequence, over one epoch or several."""

    segments: list[Segment]
    uid_C: np.ndarray
    """int64 numbers that are never used twice in a run"""
    owner_C: np.ndarray
    """the rank that prepares each"""
    code_C: np.ndarray
    """float64 codes: this rank's own, and 0 for others' until ranks have added them up"""
    prepared: dict[int, PreparedRow | Exception]
    """usable rows and failures of this rank, by position"""
    failure: Exception | None = None
    """reason why no row follows"""
    number_C: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        numbers = [each.number_C for each in self.segments]
        self.number_C = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.owner_C)

    def parts(self, start: int, stop: int) -> Iterator[tuple[Segment, int, np.ndarray]]:
        """Yield each segment that has rows from `start` to `stop`, its rows up to there, and the codes of those between."""
        begin = 0
        for segment in self.segments:
            end = begin + len(segment)
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield segment, last - begin, self.code_C[first:last]
            begin = end

    def segment_at(self, place: int) -> tuple[Segment, int]:
        """Return the segment that `place` is in, and its place there."""
        for each in self.segments:
            if place < len(each):
                return each, place
            place -= len(each)
        raise IndexError(place)


def rank_bounds(rows: int, ranks: int) -> np.ndarray:
    """Return where each rank's slice of a batch begins, and where the last one ends; int64, (ranks + 1,).

    Slices differ by at most one row. Where there are fewer rows than ranks, some are empty, but never the first: the first
    rank writes samples for all.
    """
    return -(-np.arange(ranks + 1) * rows // ranks)


def assign_ranks(owner_B: np.ndarray, ranks: int) -> np.ndarray:
    """Return places of a batch in the order of ranks, int64_B: rank r has the r-th of the slices of `rank_bounds`.

    Each rank has the rows that it owns, as far as its slice goes. The rest goes to ranks that own too few, lowest rank
    first. Within a slice rows keep their order.
    """
    share = np.diff(rank_bounds(len(owner_B), ranks))
    by_owner_B = np.argsort(owner_B, kind="stable")
    starts = np.searchsorted(owner_B[by_owner_B], np.arange(ranks))
    rank_in_owner = np.arange(len(owner_B)) - starts[owner_B[by_owner_B]]
    over = rank_in_owner >= share[owner_B[by_owner_B]]
    rank_B = np.array(owner_B)
    lacking = share - np.bincount(owner_B[by_owner_B[~over]], minlength=ranks)
    rank_B[np.sort(by_owner_B[over])] = np.repeat(np.arange(ranks), lacking)
    return np.argsort(rank_B, kind="stable")
