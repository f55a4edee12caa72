"""The global random generators that a run's providers may draw from: seeded at its start, and kept in its checkpoints.

They are those of Python's `random`, of numpy (the legacy one behind `numpy.random.rand`) and of torch. A generator that a
provider makes itself is its own to seed (`OpenContext.seed`) and to keep (`Stateful`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from rlhf_core.lazy import torch

__all__ = [
    "drawn_apart",
    "get_random_states",
    "read_apart",
    "seed_apart",
    "seed_libraries",
    "seeded_each",
    "set_random_states",
]

Row = TypeVar("Row")


def seed_libraries(seed: int) -> None:
    """Seed Python's `random`, numpy and torch, on all devices; the same on every rank."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # numpy takes 32 bits
    torch.manual_seed(seed)


def get_random_states() -> dict[str, Any]:
    """Return the states of torch (and its CUDA device, if there is one), numpy and Python in this process."""
    import numpy

    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.tensor(numpy.asarray(keys, "int64")), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Continue from what `get_random_states` returned, in this process or another one."""
    import numpy

    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    kind, keys, *rest = states["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, words, gauss_next = states["python"]
    random.setstate((version, tuple(words), gauss_next))


@contextmanager
def drawn_apart() -> Iterator[None]:
    """Leave no trace of what the block seeds and draws: after it the generators of the CPU are as they were before it."""
    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_apart(*numbers: int) -> None:
    """Seed the generators of the CPU by some numbers, inside of `drawn_apart`."""
    import numpy

    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seeded_each(make: Callable[[], Iterable[Row]], first: int, *numbers: int) -> Iterator[Row]:
    """Yield what an iterable gives, each after the generators are seeded by some numbers and its place, from `first` on.

    It is made, and its iterator begun, after the first seeding. The caller is inside of `drawn_apart`.
    """
    reader: Iterator[Row] | None = None
    for place in count(first):
        seed_apart(*numbers, place)
        reader = iter(make()) if reader is None else reader
        try:
            row = next(reader)
        except StopIteration:
            return
        yield row


def read_apart(rows: Iterable[Row], seed: int) -> Iterator[Row]:
    """Yield the rows, each read after the generators are seeded by `seed` and its place, and leave no trace of that."""
    reader = seeded_each(lambda: rows, 0, seed)
    while True:
        with drawn_apart():
            try:
                row = next(reader)
            except StopIteration:
                return
        yield row
