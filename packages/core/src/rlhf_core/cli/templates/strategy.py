"""Template of `new-plugin --kind strategy`: a strategy and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --strategy $name --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core import OptimizerProvider, Registry, Strategy, Trainable, UsageError, hookimpl
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class $cls(Strategy):
    """Core's strategy `torch` with its own number of CPU threads.

    A strategy of your own returns a `Trainable` that it defines: forward, backward, step, save, load, offload and reload.
    """

    threads: int = 0
    """CPU threads of PyTorch in each process; 0 leaves them as they are"""

    second_order: ClassVar[bool] = True

    def check(self) -> None:
        if self.threads < 0:
            raise UsageError(f"threads must be at least 0, not {self.threads}")

    def __call__(self, build: Callable[[], nn.Module], optim: OptimizerProvider | None, total_steps: int) -> Trainable:
        if self.threads:
            torch.set_num_threads(self.threads)
        strategy: Strategy = Registry(autoload=False).resolve("strategy", "torch")()
        return strategy(build, optim, total_steps)


@hookimpl
def rlhf_strategy() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_strategy

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_strategy($cls())
"""
