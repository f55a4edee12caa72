"""Forward passes whose graph is kept until training asks for them, so that a role reads the same tokens once.

Some credit reads log-probabilities of the very role that is then trained on the batch: an importance weight, a penalty in the
reward, a critic's values. Where the whole batch fits one micro-batch, that pass is made with its graph, and the training
pass is it. A larger batch is read twice: the graphs of all its micro-batches are what the token budget is there to avoid.
Cached passes are keyed by their tokens and dropped when the weights change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.roles import Trainable
    from rlhf_core.training.tape import Tape

__all__ = ["ForwardCache", "group_same_rows"]

COLUMNS = ("prompt_lengths_N", "lengths_N", "prompt_NL", "tokens_NT")


class ForwardCache:
    """The passes of one role with its present weights."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        """tape of passes and losses, in a step that is recorded"""
        self._passes: list[tuple[Batch, Mapping[str, Tensor]]] = []

    def add(self, micro: Batch, outputs: Mapping[str, Tensor]) -> None:
        """Keep the outputs for these rows, graph and all."""
        self._passes.append((micro, outputs))

    def take(self, micro: Batch, names: frozenset[str]) -> Mapping[str, Tensor] | None:
        """The outputs for these rows, if they were kept with everything wanted; a graph serves one backward pass."""
        for i, (rows, outputs) in enumerate(self._passes):
            same = all(torch.equal(getattr(rows, c), getattr(micro, c)) for c in COLUMNS)
            if names <= outputs.keys() and same and all(map(_same_images, rows.images, micro.images)):
                del self._passes[i]
                return outputs
        return None

    def compute(self, trainable: Trainable, micro: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        """Return the outputs of a new pass over these rows."""
        outputs = trainable.forward(micro, names)
        if self.tape is not None:
            self.tape.add_pass(micro, outputs)
        return outputs

    def clear(self) -> None:
        """Forget everything: the weights have moved, or memory is short."""
        self._passes.clear()


def _same_images(images: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Return True if two rows with the same tokens have the same images; usually they are the very same tensors."""
    if images is others:
        return True
    return images.keys() == others.keys() and all(torch.equal(each, others[name]) for name, each in images.items())


def group_same_rows(work: Mapping[str, Batch]) -> list[list[str]]:
    """Credit keys, those together whose batches are the same rows of the same samples: one pass serves them all."""
    groups: dict[int, list[str]] = {}
    for key, batch in work.items():
        groups.setdefault(id(batch.tokens_NT), []).append(key)
    return list(groups.values())
