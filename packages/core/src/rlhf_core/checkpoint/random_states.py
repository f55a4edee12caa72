"""The random states of every library that a run uses, as a tree that `tensors` can write."""

from __future__ import annotations

import random
from typing import Any

from rlhf_core.lazy import torch

__all__ = ["get_random_states", "set_random_states"]


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
