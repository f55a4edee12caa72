"""What an optimizer sees of a step before it: sums over rows for curvature, and the step's gradient evaluated again.

Core adds up what `OptimizerProvider.observe` returns for each micro-batch, over micro-batches and ranks. So accumulation and
world size cannot change what the optimizer receives, just as they cannot change a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import OptimizerProvider
from rlhf_core.contract.providers import Strategy
from rlhf_core.errors import ContractError, UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.results import Outputs

__all__ = ["Evaluation", "Observation", "check_second_order"]


def check_second_order(strategy: Strategy, name: str, optim: OptimizerProvider | None) -> None:
    """Check that the strategy called `name` can serve what `optim` asks for beyond a gradient.

    Raises:
        UsageError: it cannot.
    """
    if optim is not None and (optim.observes or optim.closure) and not strategy.second_order:
        raise UsageError(
            f"the optimizer {type(optim).__name__} reads more than the gradient of a step, which strategy {name} does not "
            f"give it; use {run_option('strategy', 'torch')}, or another optimizer"
        )


class Observation:
    """The sums of one optimizer step.

    Args:
        optim: the optimizer's provider.
    """

    def __init__(self, optim: OptimizerProvider) -> None:
        self.optim = optim
        self.sums: dict[str, Tensor] = {}

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of the role that it reads."""
        return self.optim.outputs if self.optim.observes else frozenset()

    def add(self, micro: Batch, outputs: Outputs, values: Mapping[str, Tensor], live: bool) -> None:
        """Add what the optimizer observes of a micro-batch; one that is not `live` (a rank has run out) counts zero."""
        if not self.optim.observes or not (live or not self.sums):
            return
        found = self.optim.observe(micro, outputs, values)
        for name, value in found.items():
            if not isinstance(value, torch.Tensor):
                raise ContractError(
                    f"optimizer {type(self.optim).__qualname__}: observe() returns tensors, {name!r} is none"
                )
            own = value.detach() if live else torch.zeros_like(value)
            self.sums[name] = self.sums[name] + own if name in self.sums else own

    def hand_over(self, optimizer: Any, world: World) -> None:
        """Give the optimizer the sums over all ranks."""
        if self.optim.observes:
            self.optim.receive(optimizer, {name: world.sum(self.sums[name]) for name in sorted(self.sums)})


class Evaluation:
    """The closure of a step: its first call returns the loss at hand, and each further call evaluates loss and gradients.

    Args:
        loss: at the present weights, whose gradients are at hand.
        again: forgets the gradients, evaluates them once more, and returns the loss over all ranks.
    """

    def __init__(self, loss: float, again: Callable[[], float]) -> None:
        self.loss = loss
        self.again = again
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return self.loss if self.calls == 1 else self.again()
