"""Template of `new-plugin --kind optimizer`: an optimizer and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --actor.optim.use $name --actor.optim.lr 0.1 --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core import OptimizerProvider, hookimpl
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch.nn import Parameter


@dataclass(frozen=True)
class $cls(OptimizerProvider):
    """Stochastic gradient descent with momentum."""

    momentum: float = 0.9
    """share of the last update that is added to the gradient"""

    elementwise: ClassVar[bool] = True

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD([each for _, each in named_parameters], lr=self.lr, momentum=self.momentum)


@hookimpl
def rlhf_optimizer() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_optimizer

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_optimizer($cls(lr=0.1))
"""
