"""The usual orders of rows: a new permutation in every epoch, for a stream within a buffer. Which rows may be read ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rlhf_core.contract.selection import Sampler

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.providers import Data

__all__ = ["SHUFFLED", "ShuffledSampler", "can_read_ahead", "shuffle_within"]


PART = 4096
"""Numbers that are Python objects at a time: those of a large set take four times the array."""


@dataclass(frozen=True)
class ShuffledSampler(Sampler):
    """Every row once per epoch, in an order that follows from the seed and the epoch."""

    reacts: ClassVar[bool] = False
    runs_ahead: ClassVar[bool] = True
    epochs: ClassVar[bool] = True

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        for epoch in count():
            order_N = np.random.default_rng([seed, epoch]).permutation(rows)
            for start in range(0, rows, PART):
                yield from order_N[start : start + PART].tolist()


SHUFFLED = ShuffledSampler()
"""The usual sampler."""


def can_read_ahead(data: Data, rows: Iterable[Example]) -> bool:
    """Return True if rows may be read in the background: reading them draws from no global random generator."""
    return data.runs_ahead or isinstance(rows, (list, tuple))


def shuffle_within(rows: Iterator[Any], size: int, generator: np.random.Generator) -> Iterator[Any]:
    """`rows` through a buffer of `size`: each that comes in pushes a random one out; the last ones leave in random order."""
    buffer = list(islice(rows, size))
    for row in rows:
        at = int(generator.integers(size))
        yield buffer[at]
        buffer[at] = row
    yield from (buffer[at] for at in generator.permutation(len(buffer)).tolist())
