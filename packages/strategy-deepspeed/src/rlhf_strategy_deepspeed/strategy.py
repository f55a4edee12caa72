"""The strategy `deepspeed`: the kind of trainable that each role gets.

Built in: ZeRO 0 to 3 in float32, bfloat16 and float16, with states in main memory if wanted, on one process or many, started by
`deepspeed`, `torchrun` or Ray. Several ranks may share each row, by its tokens (`sequence`) or by the layers' matrices
(`tensor`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.providers import Strategy
from rlhf_core.errors import MissingPackage
from rlhf_core.launcher.local import join_world
from rlhf_core.lazy import torch
from rlhf_strategy_deepspeed.memory import zero_memory
from rlhf_strategy_deepspeed.options import DeepSpeedOptions

if TYPE_CHECKING:
    from torch import nn

    from rlhf_core.contract.memory import ModelSize, RoleMemory
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_core.contract.roles import Trainable

__all__ = ["DeepSpeed"]

LOWEST = (0, 19, 8)
"""Before that it does not know the setting that stops it from counting micro-batches, and ignores it."""


@dataclass(frozen=True)
class DeepSpeed(DeepSpeedOptions, Strategy):
    """DeepSpeed ZeRO: optimizer states, gradients and weights sharded over ranks (Rajbhandari et al. 2020)."""

    by_parameter: ClassVar[bool] = True

    def check(self) -> None:
        """Raise UsageError before any model is loaded if DeepSpeed is missing or too old."""
        if find_spec("deepspeed") is None:
            raise MissingPackage(
                "strategy 'deepspeed' needs deepspeed: python3 -m pip install 'rlhf-strategy-deepspeed[deepspeed]'"
            )
        found = _deepspeed_version()
        if found < LOWEST:
            raise MissingPackage(
                f"deepspeed {'.'.join(map(str, found))} is too old: python3 -m pip install --upgrade 'deepspeed>=0.19.8'"
            )

    @property
    def narrow(self) -> bool:
        """True from stage 1 on: bfloat16 weights and sharded float32 copies."""
        return self.stage > 0

    @property
    def ranks_per_row(self) -> int:
        """The number of ranks that share each row."""
        return self.sequence * self.tensor  # one of them is 1

    def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
        """Return the share of a rank under this stage."""
        return zero_memory(whole, size, ranks, self)

    def __call__(self, build: Callable[[], nn.Module], optim: OptimizerProvider | None, total_steps: int) -> Trainable:
        """Return a trained role in its own engine; a frozen one sharded if the trained ones are, and plain otherwise."""
        self.check()
        device = prepare_process()
        from rlhf_core.models.loading.deferral import defer_weights
        from rlhf_strategy_deepspeed.frozen_shards import FrozenShards
        from rlhf_strategy_deepspeed.sequence import join_rows
        from rlhf_strategy_deepspeed.trainable import DeepSpeedTrainable

        if self.tensor > 1:
            from rlhf_strategy_deepspeed.frozen_tensors import FrozenTensors

            with defer_weights():
                module = build()
            if optim is None:
                return FrozenTensors(self, module, device)
            return DeepSpeedTrainable(self, module, optim, total_steps, device)
        if self.stage == 3 and (optim is not None or torch.distributed.get_world_size() > 1):
            with defer_weights():
                module = build()
            if optim is None:
                return FrozenShards(self, module, device)
            return DeepSpeedTrainable(self, module, optim, total_steps, device)
        if optim is not None:
            return DeepSpeedTrainable(self, build(), optim, total_steps, device)
        from rlhf_core.strategy.torch import TorchTrainable

        module = build()
        frozen = TorchTrainable(module.to(device), None, total_steps, device)
        frozen.world = join_rows(module, self)
        return frozen


def _deepspeed_version() -> tuple[int, ...]:
    """Return DeepSpeed's version; an unknown one counts as new."""
    try:
        return tuple(int(part) for part in version("deepspeed").split("+")[0].split(".")[:3])
    except (PackageNotFoundError, ValueError):
        return LOWEST


def prepare_process() -> torch.device:
    """Make DeepSpeed work in this process, a rank or the only one; returns the rank's device."""
    rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed reads it without a default
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    join_world()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # in memory: one process needs no port
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)
