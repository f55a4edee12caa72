"""An endless stream of batches over rows, the same for any number of ranks, that can be stopped and continued anywhere.

Every epoch is a permutation of the rows drawn from (seed, epoch) alone. All ranks walk the same permutation and each
takes its slice of every batch, so ranks change who reads a row and never when it is read. Batches are always full: one
may begin in an epoch and end in the next. A source without a length (streaming) is read in its own order, and on resume
it is read again up to the position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np

from rlhf_core.errors import UsageError
from rlhf_core.types import Example

__all__ = ["Stream"]


class Stream:
    """Yields `(examples, uids)`, this rank's share of each batch; a uid is unique per draw of a row.

    Args:
        examples: a sequence (shuffled) or any iterable that can be read again (read in order).
        batch_size: rows per batch over all ranks.
        seed: of the shuffling.
        rank: whose slice to give.
        world_size: how many ranks share a batch; divides `batch_size`.
        keep: rows for which it is false are passed over and counted (`Encoder.fits`, say).
    """

    dropped: int
    """rows passed over so far"""

    def __init__(
        self,
        examples: Iterable[Example],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        keep: Callable[[Example], bool] | None = None,
    ) -> None:
        if batch_size % world_size:
            raise UsageError(f"--batch-size {batch_size} cannot be shared by {world_size} ranks: use a multiple of it")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // world_size
        self._slice = slice(rank * share, (rank + 1) * share)
        self._keep = keep
        self._walk: Iterator[tuple[Example, int]] | None = None
        self.epoch = self.row = self.first_uid = self.dropped = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> tuple[list[Example], list[int]]:
        if self._walk is None:
            self._walk = self._rows()
        drawn = [next(self._walk) for _ in range(self.batch_size)][self._slice]
        return [example for example, _ in drawn], [uid for _, uid in drawn]

    def state_dict(self) -> dict[str, Any]:
        """The position: what the next batch begins with."""
        return {"epoch": self.epoch, "row": self.row, "first_uid": self.first_uid, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; seed and data must be those it came from."""
        self.epoch, self.row, self.first_uid = state["epoch"], state["row"], state["first_uid"]
        self.dropped = state["dropped"]
        self._walk = None

    def _rows(self) -> Iterator[tuple[Example, int]]:
        """Kept rows with their uids from the present position on, epoch after epoch."""
        while True:
            kept = self.row > 0  # an epoch that was entered before has been checked, or is being so
            for number, example in self._epoch():
                self.row += 1
                if self._keep is not None and not self._keep(example):
                    self.dropped += 1
                    continue
                kept = True
                yield example, self.first_uid + number
            if not self.row:
                again = f" when read again for epoch {self.epoch + 1}; give a sequence" if self.epoch else ""
                raise UsageError(f"the data has no rows{again}")
            if not kept:
                raise UsageError(f"none of the {self.row} rows can be used: all are too long (--max-prompt-tokens)")
            self.first_uid += self.row
            self.epoch, self.row = self.epoch + 1, 0

    def _epoch(self) -> Iterator[tuple[int, Example]]:
        """(row number, example) of the present epoch from the present position on."""
        if isinstance(self.examples, Sequence) or (
            isinstance(self.examples, Sized) and hasattr(self.examples, "__getitem__")
        ):
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.examples))
            for number in order[self.row :].tolist():
                yield number, self.examples[number]
            return
        for number, example in enumerate(self.examples):
            if number >= self.row:
                yield number, example
