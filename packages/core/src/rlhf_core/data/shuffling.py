"""The usual order of rows: a new permutation in every epoch. Which rows may be read ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rlhf_core.contract.selection import Sampler

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.providers import Data

__all__ = ["SHUFFLED", "ShuffledSampler", "can_read_ahead"]


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
