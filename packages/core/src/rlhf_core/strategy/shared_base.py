"""A frozen role that is another's model without its adapters, and so costs no memory: the reference of a LoRA run.

A strategy's trainable returns it from `shared_base()`. The launcher asks for it where the plan finds that two roles are
the same model (`Plan.base_owner`). A launcher or strategy that keeps roles apart loads the model twice, with equal numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_core.contract.roles import Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch

__all__ = ["SharedBase"]


class SharedBase(Trainable):
    """The model of `base_owner`, its adapters switched off whenever this answers."""

    def __init__(self, base_owner: Trainable) -> None:
        self.base_owner = base_owner
        self.world = base_owner.world
        self.module: Any = base_owner.module
        self.sharded = base_owner.sharded

    def full(self, parameter: Tensor) -> Tensor:
        return self.base_owner.full(parameter)

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        with self.module.without_adapters():
            return self.base_owner.forward(batch, names)

    def backward(self, loss: Tensor) -> NoReturn:
        raise AssertionError("a frozen role is not trained")

    def step(self) -> NoReturn:
        raise AssertionError("a frozen role is not trained")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        with self.module.without_adapters():
            yield from self.base_owner.weights()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        with self.module.without_adapters(), self.base_owner.gathered():
            yield

    def save(self, folder: str) -> None:
        """Nothing: a frozen role is loaded again from where it came."""

    def load(self, folder: str) -> None:
        """Nothing: a frozen role is loaded again from where it came."""

    @property
    def held_bytes(self) -> int:
        """Return nothing."""
        return 0

    def offload(self) -> None:
        """Nothing: where the model is, is the base_owner's business."""

    def reload(self) -> None:
        """Nothing: where the model is, is the base_owner's business."""
