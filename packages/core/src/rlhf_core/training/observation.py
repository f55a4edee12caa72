"""Views of a step for optimizers: sums over rows for curvature, the rows, and the step evaluated again.

Core adds up what `OptimizerProvider.observe` returns for each micro-batch, over micro-batches and ranks. Values per row are
put into the order of the data. So accumulation and world size cannot change what the optimizer receives, just as they cannot
change a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import OptimizerProvider, StepClosure
from rlhf_core.contract.providers import Strategy
from rlhf_core.contract.requirements import per_row
from rlhf_core.errors import ContractError, UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.results import Outputs

__all__ = ["ClippedClosure", "Evaluation", "Observation", "check_second_order"]


def check_second_order(strategy: Strategy, name: str, optim: OptimizerProvider | None) -> None:
    """Check that the strategy called `name` can serve what `optim` asks for beyond a gradient.

    Raises:
        UsageError: it cannot.
    """
    if optim is not None and (optim.observes or optim.closure) and not strategy.second_order:
        raise UsageError(
            f"the optimizer {type(optim).__name__} needs more than the gradient of a step, which strategy {name} "
            f"does not provide; use {run_option('strategy', 'torch')}, or another optimizer"
        )


class _Rows(NamedTuple):
    """Values of some rows of a rank."""

    prompt_N: Tensor
    """numbers of their prompts, in the order of the data"""
    place_N: Tensor
    """their numbers in the rank's batch"""
    values: dict[str, Tensor]
    """(N, …) by name"""


class Observation:
    """The sums and rows of one optimizer step.

    Args:
        optim: the optimizer's provider.
    """

    def __init__(self, optim: OptimizerProvider) -> None:
        self.optim = optim
        self.sums: dict[str, Tensor] = {}
        self.rows: list[_Rows] = []

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of the role that it reads."""
        return self.optim.outputs if self.optim.observes else frozenset()

    def add(
        self,
        micro: Batch,
        outputs: Outputs,
        values: Mapping[str, Tensor],
        live: bool,
        place_N: Tensor | None = None,
    ) -> None:
        """Add what the optimizer observes of a micro-batch; one that is not `live` (a rank has run out) counts zero.

        `place_N` are the numbers of its rows in the rank's batch; 0, 1, … if absent.
        """
        if not self.optim.observes or not (live or not self.sums):
            return
        found = self.optim.observe(micro, outputs, values)
        own = {name: value for name, value in found.items() if self._check(name, value, len(micro))}
        if own and live:
            place_N = torch.arange(len(micro)) if place_N is None else place_N
            prompt_N = micro.extras.get("uids_N", micro.group_N)
            self.rows.append(_Rows(prompt_N, place_N, {name: each.detach().cpu() for name, each in own.items()}))
        for name, value in found.items():
            if name not in own:
                counted = value.detach() if live else torch.zeros_like(value)
                self.sums[name] = self.sums[name] + counted if name in self.sums else counted

    def _check(self, name: str, value: Any, rows: int) -> bool:
        """Return True if `value` has one entry per row, False if it is a sum.

        Raises:
            ContractError: it is no tensor, or has another number of rows than the micro-batch.
        """
        who = f"optimizer {type(self.optim).__qualname__}: observe()"
        if not isinstance(value, torch.Tensor):
            raise ContractError(f"{who} must return tensors, but {name!r} is not one")
        if per_row(name) and (not value.dim() or len(value) != rows):
            raise ContractError(f"{who} returns {name!r} of shape {tuple(value.shape)} for {rows} rows")
        return per_row(name)

    def hand_over(self, optimizer: Any, world: World) -> None:
        """Give the optimizer the sums over all ranks, and the rows of all ranks."""
        if self.optim.observes:
            sums = {name: world.sum(self.sums[name]) for name in sorted(self.sums)}
            self.optim.receive(optimizer, {**sums, **_gather_rows(self.rows, world)})


def _gather_rows(rows: Sequence[_Rows], world: World) -> dict[str, Tensor]:
    """Return the values of the rows of all ranks in the order of the data; rows of one prompt in the order of the batch."""
    parts = [part for each in world.gather(list(rows)) for part in each]
    if not parts:
        return {}
    prompt_N = torch.cat([part.prompt_N for part in parts])
    place_N = torch.cat([part.place_N for part in parts])
    order_N = place_N.argsort(stable=True)
    order_N = order_N[prompt_N[order_N].argsort(stable=True)]
    return {name: torch.cat([part.values[name] for part in parts])[order_N] for name in parts[0].values}


class Evaluation:
    """The closure of a step (`StepClosure`).

    Args:
        loss: at the present weights, whose gradients are at hand.
        again: forgets the gradients, evaluates them once more, and returns the loss over all ranks.
        product: the Hessian of the step's loss times vectors, over all ranks.
    """

    def __init__(
        self, loss: float, again: Callable[[], float], product: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> None:
        self.loss = loss
        self.again = again
        self.product = product
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return self.loss if self.calls == 1 else self.again()


class ClippedClosure:
    """Wrapper that a strategy gives to an optimizer: `closure` with gradients summed and clipped like the current ones.

    Args:
        closure: that of the step.
        reduce: sums and clips the gradients.
    """

    def __init__(self, closure: StepClosure, reduce: Callable[[], object]) -> None:
        self.closure = closure
        self.reduce = reduce
        self.product = closure.product
        self.evaluated = False

    def __call__(self) -> float:
        loss = self.closure()
        if self.evaluated:
            self.reduce()
        self.evaluated = True
        return loss
