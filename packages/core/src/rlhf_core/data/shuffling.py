"""The usual order of rows: a new permutation in every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np

from rlhf_core.contract.selection import Sampler

__all__ = ["SHUFFLED", "ShuffledSampler"]


PART = 4096
"""Numbers that are Python objects at a time: those of a large set take four times the array."""


@dataclass(frozen=True)
class ShuffledSampler(Sampler):
    """Every row once per epoch, in an order that follows from the seed and the epoch."""

    reacts: ClassVar[bool] = False
    epochs: ClassVar[bool] = True

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        for epoch in count():
            order_N = np.random.default_rng([seed, epoch]).permutation(rows)
            for start in range(0, rows, PART):
                yield from order_N[start : start + PART].tolist()


SHUFFLED = ShuffledSampler()
"""The usual sampler."""
