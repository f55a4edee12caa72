"""The global random generators that a run's providers may draw from: seeded at its start, and kept in its checkpoints.

They are those of Python's `random`, of numpy (the legacy one behind `numpy.random.rand`) and of torch. A generator that a
provider makes itself is its own to seed (`OpenContext.seed`) and to keep (`Stateful`).
"""

from __future__ import annotations

import random
from typing import Any

from rlhf_core.lazy import torch

__all__ = ["get_random_states", "seed_libraries", "set_random_states"]


def seed_libraries(seed: int) -> None:
    """Seed Python's `random`, numpy and torch, on all devices; the same on every rank."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # numpy takes 32 bits
    torch.manual_seed(seed)


def get_random_states() -> dict[str, Any]:
    """Of this process: torch (and its CUDA device, if there is one), numpy and Python."""
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
