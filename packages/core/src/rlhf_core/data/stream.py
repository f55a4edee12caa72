"""An endless stream of batches over rows, the same for any number of ranks, that can be stopped and continued anywhere.

A sampler gives the numbers of the rows; the usual one permutes them anew in every epoch, from (seed, epoch) alone. All
ranks draw the same numbers and each takes its slice of every batch, so ranks change who reads a row and never when it is
read. Batches are always full: one may begin in an epoch and end in the next. A source without a length (streaming) is read
in its own order, or shuffled within a buffer by (seed, epoch); on resume it is read again up to the position, which makes
the same buffer again. A reader with a state continues from that by itself, and is read row by row, so that its state
belongs to the last row drawn. So are rows whose sampler reacts to scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np

from rlhf_core.contract.batch import Example
from rlhf_core.contract.selection import Sampler
from rlhf_core.data.render import LIMITS_ADVICE
from rlhf_core.data.shuffling import SHUFFLED
from rlhf_core.errors import ContractError, DataError, OptionError, UsageError

if TYPE_CHECKING:
    from rlhf_core.data.rows import TokenizedRow

__all__ = ["DrawnRows", "PreparedRow", "Stream", "is_indexed"]


class PreparedRow(NamedTuple):
    """A row of data on its way into a batch."""

    example: Example
    uid: int
    tokens: TokenizedRow | None
    """the example tokenised, if rows are prepared"""


class DrawnRows(NamedTuple):
    """A batch of data, as `Encoder.prompts` and `Encoder.batch` take it."""

    examples: list[Example]
    uids: list[int]
    """a number for each that is never used twice in a run"""
    rows: list[TokenizedRow] | None = None
    """the examples tokenised, by whoever prepared them"""


class Stream:
    """Yields this rank's share of each batch.

    Args:
        examples: a sequence, or any iterable that can be read again (in order, or shuffled within `buffer`).
        batch_size: rows per batch over all ranks.
        seed: of the shuffling.
        rank: whose slice to give.
        world_size: how many ranks share a batch; divides `batch_size`.
        prepare: makes rows of examples (`Preparer`): None for those to be passed over, an error for those to stop at.
        block: how many examples to prepare at a time, if that is more than a batch.
        buffer: rows to shuffle a source without a length within; 0 keeps its order.
        readers: returns a copy of what readers with a state remember, by place; None if no reader has one.
        sampler: the provider that orders a sequence.
        engine: what it has opened; the provider itself if absent.
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
    ) -> None:
        if readers is not None and buffer:
            raise OptionError("/data.shuffle_buffer", f"{buffer}: a reader with a state orders its rows itself; pass 0")
        if batch_size % world_size:
            raise OptionError(
                "/batch_size", f"{batch_size} cannot be shared by {world_size} ranks: use a multiple of it"
            )
        if not sampler.epochs and not is_indexed(examples):
            raise OptionError(
                "/sampler",
                f"{type(sampler).__qualname__} chooses rows by number, and the data is a stream without a length",
            )
        self.examples = examples
        self.batch_size = batch_size
        self.sampler = sampler
        self.seed = seed
        self.leads = rank == 0
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._prepare = prepare
        self._block = max(block, batch_size) if readers is None and not sampler.reacts else 1
        self._buffer = buffer
        self._readers = readers
        self._engine = engine or sampler
        self._walk: Iterator[PreparedRow] | None = None
        self._numbers: Iterator[int] | None = None
        self.epoch = self.row = self.first_uid = self.dropped = self.truncated = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> DrawnRows:
        return self.share(self.draw())

    def draw(self) -> list[PreparedRow]:
        """Return the next rows of all ranks."""
        if self._walk is None:
            self._walk = self._rows()
        return [next(self._walk) for _ in range(self.batch_size)]

    def reread(self, places: Iterable[tuple[int, int]]) -> list[PreparedRow]:
        """Return rows that were drawn before, by number and uid."""
        examples = [self._example(number) for number, _ in places]
        rows: Sequence[Any] = [None] * len(examples) if self._prepare is None else self._prepare(examples)
        return [PreparedRow(example, uid, row) for example, (_, uid), row in zip(examples, places, rows, strict=True)]

    def share(self, drawn: Sequence[PreparedRow]) -> DrawnRows:
        """Return this rank's rows of those that all ranks drew."""
        mine = drawn[self._slice]
        rows = [row.tokens for row in mine if row.tokens is not None] if self._prepare else None
        return DrawnRows([row.example for row in mine], [row.uid for row in mine], rows)

    def state_dict(self) -> dict[str, Any]:
        """The position: what the next batch begins with."""
        position = {name: getattr(self, name) for name in ("epoch", "row", "first_uid", "dropped", "truncated")}
        return position if self._readers is None else position | {"readers": self._readers()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; seed and data must be those it came from. Readers have got their states before."""
        for name in ("epoch", "row", "first_uid", "dropped", "truncated"):
            setattr(self, name, state[name])
        self._walk = self._numbers = None

    def _rows(self) -> Iterator[PreparedRow]:
        """Usable rows with their uids from the present position on, epoch after epoch."""
        while True:
            kept = self.row > 0  # an epoch that was entered before has been checked, or is being so
            for number, example, row in self._prepare_blocks():
                self.row += 1
                if isinstance(row, DataError):
                    raise row
                if row is None and self._prepare is not None:
                    self.dropped += 1
                    continue
                self.truncated += row is not None and row.cut
                kept = True
                yield PreparedRow(example, self.first_uid + (number if self.sampler.epochs else self.row - 1), row)
            if not self.row:
                again = f" when read again for epoch {self.epoch + 1}; give a sequence" if self.epoch else ""
                raise UsageError(f"the data has no rows{again}")
            if not kept:
                raise UsageError(f"none of the {self.row} rows can be used: all are too long; {LIMITS_ADVICE}")
            self.first_uid += self.row
            self.epoch, self.row = self.epoch + 1, 0

    def _prepare_blocks(self) -> Iterator[tuple[int, Example, TokenizedRow | DataError | None]]:
        """The rest of the present epoch, made ready a block at a time."""
        if self._prepare is None:
            yield from ((number, example, None) for number, example in self._epoch())
            return
        rest = self._epoch()
        while block := list(islice(rest, self._block)):
            rows = self._prepare([example for _, example in block])
            yield from ((number, example, row) for (number, example), row in zip(block, rows, strict=True))

    def _epoch(self) -> Iterator[tuple[int, Example]]:
        """(row number, example) of the present epoch from the present position on."""
        if is_indexed(self.examples):
            for _ in range(self.row, len(self.examples)):
                number = self._next_number(len(self.examples))
                yield number, self._example(number)
            return
        if self._readers is not None:
            rows: Iterator[tuple[int, Example]] = enumerate(self.examples, self.row)
        else:
            rows = enumerate(self.examples)
            if self._buffer:
                rows = _shuffle(rows, self._buffer, np.random.default_rng([self.seed, self.epoch]))
            rows = islice(rows, self.row, None)
        yield from ((number, replace(example, row=number)) for number, example in rows)

    def _example(self, number: int) -> Example:
        """The row of this number, which it carries."""
        examples: Any = self.examples
        example: Example = examples[number]
        return replace(example, row=number)

    def _next_number(self, rows: int) -> int:
        """The next number that the sampler gives.

        Raises:
            ContractError: it gives none, or none of a row.
        """
        who = f"sampler {type(self.sampler).__qualname__} of {type(self.sampler).__module__}"
        if self._numbers is None:
            drawn = 0 if self.sampler.reacts else self.first_uid + self.row  # one that reacts continues from its state
            self._numbers = islice(self._engine(rows, self.seed), drawn, None)
        try:
            number = next(self._numbers)
        except StopIteration:
            raise ContractError(f"{who} has no more rows; its iterator must be endless") from None
        if not isinstance(number, (int, np.integer)) or not 0 <= number < rows:
            raise ContractError(f"{who} gave {number!r}, which is no row number from 0 to {rows - 1}")
        return int(number)


def is_indexed(examples: Iterable[Example]) -> TypeGuard[Sequence[Example]]:
    """Return True if rows are read by number."""
    return isinstance(examples, Sequence) or (isinstance(examples, Sized) and hasattr(examples, "__getitem__"))


def _shuffle(rows: Iterator[Any], size: int, generator: np.random.Generator) -> Iterator[Any]:
    """`rows` through a buffer of `size`: each that comes in pushes a random one out; the last ones leave in random order."""
    buffer = list(islice(rows, size))
    for row in rows:
        at = int(generator.integers(size))
        yield buffer[at]
        buffer[at] = row
    yield from (buffer[at] for at in generator.permutation(len(buffer)).tolist())
