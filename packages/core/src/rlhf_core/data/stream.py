"""An endless stream of batches over rows, the same for any number of ranks, that can be stopped and continued anywhere.

A sampler gives the numbers of the rows; the usual one permutes them anew in every epoch, from (seed, epoch) alone. All ranks
draw the same numbers, each prepares its own rows of them, and they add up which rows are usable (`data.chunks`). So ranks
change who reads a row and never which batch it is in. Batches are always full: one may begin in an epoch and end in the next.
A source without a length (streaming) is read in its own order, or shuffled within a buffer by (seed, epoch) (`data.reading`).
A reader with a state continues from it, and no row is read that the batch at hand does not need, so that its state
belongs to the last row drawn. The same holds for a sampler that reacts to scores.

Draws of a reader or a sampler from the global random generators follow from the seed and the row's place alone, if these
are seeded for each row (`seeds_rows`): other code draws from them too, and a resumed run reads rows again or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.contract.selection import Sampler
from rlhf_core.data.chunks import CUT, DROPPED, FAILED, USABLE, Chunk, PreparedRow, assign_ranks, rank_bounds
from rlhf_core.data.draws import Draws, is_indexed
from rlhf_core.data.reading import Place
from rlhf_core.data.render import LIMITS_ADVICE
from rlhf_core.data.shuffling import SHUFFLED
from rlhf_core.errors import DataError, OptionError, UsageError

if TYPE_CHECKING:
    from rlhf_core.data.rows import TokenizedRow

__all__ = ["READING", "DrawnBatch", "DrawnRows", "Stream", "is_indexed"]

BATCHES = 8
"""Batches in a chunk where ranks have to agree on its rows: an eighth of a collective per batch."""
READING = "reading"
"""Key in a position: the pass over a source that is read in order."""
POSITION = ("epoch", "row", "first_uid", "dropped", "truncated")
"""Parts of a position."""


class DrawnRows(NamedTuple):
    """A batch of data, as `Encoder.prompts` and `Encoder.batch` take it."""

    examples: list[Example]
    uids: list[int]
    """a number for each that is never used twice in a run"""
    rows: list[TokenizedRow] | None = None
    """the examples in tokenized form, if they were prepared"""


class DrawnBatch(NamedTuple):
    """A batch of all ranks, as one rank has it."""

    rows: DrawnRows
    """rows of this rank"""
    number_B: np.ndarray
    """row numbers, int64, by rank"""
    uid_B: np.ndarray
    """uids, int64, by rank"""


class Stream:
    """Yields this rank's share of each batch.

    Args:
        examples: a sequence, or any iterable that can be read again (in order, or shuffled within `buffer`).
        batch_size: rows per batch over all ranks.
        seed: of the shuffling.
        rank: whose slice to give.
        world_size: how many ranks share a batch. Their slices differ by at most one row.
        prepare: makes rows of examples (`Preparer`): None for those to be passed over, an error for those to stop at.
        block: how many examples of this rank to prepare at a time, if that is more than its share of a batch.
        buffer: rows to shuffle a source without a length within; 0 keeps its order.
        readers: returns a copy of what readers with a state remember, by place; None if no reader has one.
        sampler: the provider that orders a sequence.
        engine: what it has opened; the provider itself if absent.
        add_up: returns the sum over ranks of a float64 array; all ranks call it in the same order.
        seeds_rows: seed the global random generators before each row is read and each number is chosen.
        reader: name of what gave the examples, for messages.
    """

    dropped: int
    """rows passed over so far"""
    truncated: int
    """rows cut so far"""

    def __init__(
        self,
        examples: Iterable[Example],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prepare: Callable[[Sequence[Example]], Sequence[TokenizedRow | DataError | None]] | None = None,
        block: int = 0,
        buffer: int = 0,
        readers: Callable[[], Mapping[str, Any]] | None = None,
        sampler: Sampler = SHUFFLED,
        engine: Callable[[int, int], Iterator[int]] | None = None,
        add_up: Callable[[np.ndarray], np.ndarray] | None = None,
        seeds_rows: bool = False,
        reader: str = "the data",
    ) -> None:
        if readers is not None and buffer:
            raise OptionError(
                "/data.shuffle_buffer", f"{buffer}: a reader with a state sets the order of its rows; pass 0"
            )
        if not sampler.epochs and not is_indexed(examples):
            raise OptionError(
                "/sampler",
                f"{type(sampler).__qualname__} chooses rows by number, but the data is a stream without a length; "
                "choose another sampler",
            )
        self.examples = examples
        self.batch_size = batch_size
        self.sampler = sampler
        self.rank, self.ranks = rank, world_size
        self.exact = readers is not None or sampler.reacts
        """True if no row may be drawn that the batch at hand does not need"""
        self.pull: Callable[[], Chunk] = self.chunk
        """source of the next chunk; chunks may be made ahead"""
        self._bounds = rank_bounds(batch_size, world_size)
        self._own = slice(*self._bounds[rank : rank + 2].tolist())
        self._prepare = prepare
        self._chunk_batches = max(-(-block // -(-batch_size // world_size)), BATCHES if world_size > 1 else 1)
        self._readers = readers
        stateful = readers is not None
        self._draws = Draws(examples, seed, sampler, engine or sampler, buffer, stateful, seeds_rows, reader)
        self._add_up = add_up
        self.epoch = self.row = self.first_uid = self.dropped = self.truncated = 0
        self._begin()

    def _begin(self, reading: Mapping[str, Any] | None = None) -> None:
        """Draw from the present position on, and continue the pass whose state is `reading`."""
        self._draws.move(self.epoch, self.row, self.first_uid, reading)
        self._moment: Place | Mapping[str, Any] | None = None
        self._chunks = 0
        self._missing = self.batch_size
        self._pending: Chunk | None = None
        self._at = 0
        self._kept = self.row > 0  # an epoch that was entered before has been checked, or is being so

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> DrawnRows:
        return self.draw().rows

    # ------------------------------------------------------------------------------------------------------------------
    # batches

    def draw(self) -> DrawnBatch:
        """Return the next batch. Where ranks share it, they all call this in the same order.

        Raises:
            DataError: a row is wrong; each rank raises it.
            UsageError: there are no rows, or none that is usable.
        """
        parts: list[tuple[Chunk, np.ndarray]] = []
        self._missing = self.batch_size
        while self._missing:
            chunk = self._present_chunk()
            usable = (chunk.code_C[self._at :] == USABLE) | (chunk.code_C[self._at :] == CUT)
            places = self._at + np.flatnonzero(usable)[: self._missing]
            self._missing -= len(places)
            self._pass(chunk, len(chunk) if self._missing else int(places[-1]) + 1)
            parts.append((chunk, places))
        order_B = assign_ranks(_join(parts, "owner_C"), self.ranks)
        rows = [self._row_at(*_locate(parts, i)) for i in order_B[self._own].tolist()]
        return DrawnBatch(self._join_rows(rows), _join(parts, "number_C")[order_B], _join(parts, "uid_C")[order_B])

    def reread(self, places: Sequence[tuple[int, int]]) -> DrawnBatch:
        """Return a batch that was drawn before, by number and uid of its rows."""
        number_B, uid_B = np.array(places, np.int64).reshape(-1, 2).T
        examples = list(map(self._draws.example, number_B[self._own].tolist(), uid_B[self._own].tolist()))
        rows: Sequence[Any] = [None] * len(examples) if self._prepare is None else self._prepare(examples)
        prepared = list(map(PreparedRow, examples, uid_B[self._own].tolist(), rows))
        return DrawnBatch(self._join_rows(prepared), number_B, uid_B)

    def state_dict(self) -> dict[str, Any]:
        """The position: what the next batch begins with. Of a source that can begin in its middle, with a `Place` of it."""
        position: dict[str, Any] = {name: getattr(self, name) for name in POSITION}
        if self._moment is not None:
            position[READING] = self._moment
        return position if self._readers is None else position | {"readers": self._readers()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position; seed and data must be those it came from. Readers have got their states before."""
        for name in POSITION:
            setattr(self, name, state[name])
        reading = state.get(READING)
        self._begin(reading.plain() if isinstance(reading, Place) else reading)
        self._moment = reading

    def _present_chunk(self) -> Chunk:
        """The chunk whose rows come next, with the codes of all ranks. Raises what ended it, if that comes next."""
        while self._pending is None or self._at == len(self._pending):
            if self._pending is not None and self._pending.failure is not None:
                self._check_kept()
                raise self._pending.failure
            self._pending, self._at = self.pull(), 0
            if self.ranks > 1 and self._prepare is not None:
                assert self._add_up is not None, "ranks that share batches add up their codes"
                self._pending.code_C = self._add_up(self._pending.code_C)
        return self._pending

    def _pass(self, chunk: Chunk, stop: int) -> None:
        """Move the position behind the rows up to `stop`, and count those that are left out or cut."""
        start = self._at
        for failed in np.flatnonzero(chunk.code_C[start:stop] == FAILED)[:1].tolist():
            self._at = start + failed  # for later requests
            raise self._failure_at(chunk, self._at)
        for segment, rows, code_C in chunk.parts(start, stop):
            if segment.epoch != self.epoch:
                self._check_kept()
                self._kept = False
            self.epoch, self.row, self.first_uid = segment.epoch, segment.first_row + rows, segment.first_uid
            self._moment = segment.moment
            self._kept |= bool((code_C != DROPPED).any())
            self.dropped += int((code_C == DROPPED).sum())
            self.truncated += int((code_C == CUT).sum())
        self._at = stop

    def _check_kept(self) -> None:
        """Raise an error if the epoch that ends had rows and none was usable."""
        if self.row and not self._kept:
            raise UsageError(f"none of the {self.row} rows can be used, since all are too long; {LIMITS_ADVICE}")

    def _row_at(self, chunk: Chunk, place: int) -> PreparedRow:
        """A usable row; prepared here and now if another rank owns it."""
        row = chunk.prepared.get(place) or self._prepare_again(chunk, place)
        if isinstance(row, Exception):
            raise row
        return row

    def _failure_at(self, chunk: Chunk, place: int) -> Exception:
        """The failure of a row, which is the same on every rank."""
        row = chunk.prepared.get(place) or self._prepare_again(chunk, place)
        if isinstance(row, Exception):
            return row
        return DataError(f"{row.example.origin}: the row cannot be read on rank {chunk.owner_C[place]}")

    def _prepare_again(self, chunk: Chunk, place: int) -> PreparedRow | Exception:
        """A row that another rank owns, or why it cannot be prepared."""
        try:
            example = self._draws.example_in(*chunk.segment_at(place))
            (tokens,) = [None] if self._prepare is None else self._prepare([example])
        except Exception as error:
            return error
        if isinstance(tokens, DataError):
            return tokens
        return PreparedRow(example, int(chunk.uid_C[place]), tokens)

    def _join_rows(self, rows: Sequence[PreparedRow]) -> DrawnRows:
        tokens = [row.tokens for row in rows if row.tokens is not None] if self._prepare else None
        return DrawnRows([row.example for row in rows], [row.uid for row in rows], tokens)

    # ------------------------------------------------------------------------------------------------------------------
    # chunks

    def chunk(self) -> Chunk:
        """Draw the next rows of all ranks, and prepare those that this rank owns."""
        begin, batches = self._draws.place, self._chunk_batches if self._chunks else 1
        aligned = self.batch_size * batches - begin % self.batch_size
        segments, failure = self._draws.segments(self._missing if self.exact else aligned)
        self._chunks += 1
        place_C = begin + np.arange(sum(map(len, segments)))
        uids = [each.first_uid + each.number_C for each in segments]
        uid_C = np.concatenate(uids) if self.sampler.epochs and uids else place_C
        owner_C = np.searchsorted(self._bounds, place_C % self.batch_size, side="right") - 1
        chunk = Chunk(segments, uid_C, owner_C, np.full(len(place_C), float(self._prepare is None)), {}, failure)
        self._prepare_own(chunk)
        return chunk

    def _prepare_own(self, chunk: Chunk) -> None:
        """Fill in this rank's rows and codes."""
        examples: dict[int, Example] = {}
        for place in np.flatnonzero(chunk.owner_C == self.rank).tolist():
            try:
                examples[place] = self._draws.example_in(*chunk.segment_at(place))
            except Exception as error:  # raised when its turn comes, by every rank
                chunk.prepared[place] = error
        rows: Sequence[Any] = [None] * len(examples)
        if self._prepare is not None:
            try:
                rows = self._prepare(list(examples.values()))
            except Exception as error:
                chunk.prepared.update(dict.fromkeys(examples, error))
                examples = {}
        for (place, example), row in zip(examples.items(), rows):
            if isinstance(row, DataError):
                chunk.prepared[place] = row
            elif row is not None or self._prepare is None:
                chunk.prepared[place] = PreparedRow(example, int(chunk.uid_C[place]), row)
                chunk.code_C[place] = CUT if row is not None and row.cut else USABLE
        for place, found in chunk.prepared.items():
            if isinstance(found, Exception):
                chunk.code_C[place] = FAILED


def _join(parts: Sequence[tuple[Chunk, np.ndarray]], name: str) -> np.ndarray:
    """A column of the chosen places of chunks."""
    return np.concatenate([getattr(chunk, name)[places] for chunk, places in parts])


def _locate(parts: Sequence[tuple[Chunk, np.ndarray]], i: int) -> tuple[Chunk, int]:
    """The chunk and the place of the i-th of the chosen places."""
    for chunk, places in parts:
        if i < len(places):
            return chunk, int(places[i])
        i -= len(places)
    raise IndexError(i)
