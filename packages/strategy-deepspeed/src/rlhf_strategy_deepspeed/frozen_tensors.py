"""A frozen role whose layers are cut over the ranks that share rows (`tensor`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rlhf_core.strategy.torch import TorchTrainable
from rlhf_strategy_deepspeed.tensor import cut_layers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["FrozenTensors"]


class FrozenTensors(TorchTrainable):
    """A module that only answers; what its layers do not cut is whole on every rank."""

    sharded = True

    def __init__(self, options: DeepSpeedOptions, module: nn.Module, device: torch.device) -> None:
        self.shards = cut_layers(module, options.tensor)
        super().__init__(module.to(device), None, 0, device)
        self.world = self.shards.world

    def full(self, parameter: Tensor) -> Tensor:
        return self.shards.full(parameter)

    def join_shares(self, parameter: Tensor, share: Tensor) -> Tensor:
        return self.shards.join(parameter, share)

    def assign(self, parameter: Tensor, whole: Tensor) -> None:
        super().assign(parameter, self.shards.part(parameter, whole))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.hf_weights(self.shards.full)  # type: ignore[operator]

    def gathered(self) -> AbstractContextManager[None]:
        return self.shards.gathered()
