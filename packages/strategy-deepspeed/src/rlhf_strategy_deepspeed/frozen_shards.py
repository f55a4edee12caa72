"""A frozen role whose weights are sharded over the ranks, for models that fit on no single device (stage 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NoReturn

from rlhf_core.contract.distributed import World
from rlhf_core.contract.roles import Trainable
from rlhf_strategy_deepspeed.config import configuration
from rlhf_strategy_deepspeed.engine import (
    assign,
    forward,
    gather_weights,
    initialize,
    mark_leaves,
    shard,
    show,
    whole,
    whole_weights,
)
from rlhf_strategy_deepspeed.parking import Parking
from rlhf_strategy_deepspeed.sequence import join_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch
    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["FrozenShards"]


class FrozenShards(Trainable):
    """A module that only answers."""

    sharded = True

    def __init__(self, options: DeepSpeedOptions, module: nn.Module, device: torch.device) -> None:
        config = configuration(options, str(module.compute_dtype).removeprefix("torch."), None)
        if options.show_config:
            show("a frozen role", config)
        self.world: World = join_rows(module, options)
        self.bucket = config["zero_optimization"]["reduce_bucket_size"]
        self.device = device
        module.eval().requires_grad_(False)
        mark_leaves(module, options.leaf_modules)
        shard(module, config, device)
        self.engine = initialize(module, config)
        self.parking = Parking(self.engine, device)
        self.module: nn.Module = self.engine.module

    def forward(self, batch: Batch, names: frozenset[str]) -> dict[str, Tensor]:
        return forward(self.engine, batch, names, self.device)

    def backward(self, loss: Tensor) -> NoReturn:
        raise AssertionError("a frozen role is not trained")

    def step(self) -> NoReturn:
        raise AssertionError("a frozen role is not trained")

    def full(self, parameter: Tensor) -> Tensor:
        return whole(parameter)

    def assign(self, parameter: Tensor, whole: Tensor) -> None:
        assign(parameter, whole)

    def gathered(self) -> AbstractContextManager[None]:
        return gather_weights(self.engine)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from whole_weights(self.module, self.bucket)

    def save(self, folder: str) -> None:
        """Nothing: a frozen role is loaded again from where it came."""

    def load(self, folder: str) -> None:
        """Nothing: a frozen role is loaded again from where it came."""

    def offload(self) -> None:
        self.parking.leave()

    def reload(self) -> None:
        self.parking.come_back()
