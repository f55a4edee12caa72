"""Optimizers of roles: the base class of their providers, and AdamW, which every role has unless another one is chosen.

A provider is chosen per role (`--actor.optim.use muon`) and called with the role's trained parameters by name. Its
return value is an ordinary `torch.optim.Optimizer`, whose state is in every checkpoint. Five options belong to core and
not to the method: the peak learning rate, its schedule (three of them) and clipping. Core applies them around any
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from rlhf_core.contract.providers import Provider
from rlhf_core.contract.ranges import at_least, at_most, finite
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["AdamW", "OptimizerProvider", "StepClosure", "parameter_groups"]


class StepClosure(Protocol):
    """Argument of an optimizer's `step` if its provider declares `closure`."""

    def __call__(self) -> float:
        """Return the loss over all ranks. The first call returns the one at hand; each further call evaluates it again, with
        its gradients, at the present weights."""

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian of the whole step's loss, at the present weights, times `vectors`; gradients at hand stay.

        Args:
            vectors: one per trained parameter, of its shape, in the order in which the provider got them.

        Double backward (Pearlmutter 1994), summed over micro-batches and ranks; never clipped. Collective.

        Raises:
            UsageError: the forward pass has no second derivative, such as that of flash attention.
        """


@dataclass(frozen=True)
class OptimizerProvider(Provider):
    """An optimizer of a role, with the schedule and clipping that core applies around it.

    A subclass is a frozen dataclass; its fields are options under `--<role>.optim`. Where a user chooses it in place of the
    algorithm's optimizer, the five fields here keep the algorithm's values, but for those that the subclass declares again.
    """

    lr: float = 1e-6
    """peak learning rate"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """learning rate after warm-up: constant, linear decay, or half-cosine decay, to `min_lr_ratio` of the peak"""
    warmup: float = 0.0
    """length of the warm-up: below 1 a share of all optimizer steps, from 1 a number of steps"""
    min_lr_ratio: float = 0.0
    """final learning rate of linear and cosine, as a share of `lr`, reached one step after the last; every step's rate
    is above it"""
    max_grad_norm: float = 1.0
    """largest global gradient norm; larger gradients are clipped to it, 0 does not clip"""

    elementwise: ClassVar[bool] = False
    """True if the update of a number depends on its own gradients alone, so that shards may be updated apart (ZeRO)"""
    closure: ClassVar[bool] = False
    """True if `step` takes a closure, which computes loss and gradients of the whole optimizer step again"""
    observes: ClassVar[bool] = False
    """True if it has `observe` and `receive`"""
    hands_on: ClassVar[bool] = False
    """True if a later training may continue its state, by an option `state`: recipes then keep it"""
    one_pass: ClassVar[bool] = False
    """True if a row that comes twice would count twice: `--epochs` then leaves an incomplete last batch out, and does not fill
    it with rows of a further pass"""
    config_defaults: ClassVar[Mapping[str, Any]] = {}
    """core's own options (fields of `RunConfig`) that have another default where a role has this optimizer"""
    outputs: ClassVar[frozenset[str]] = frozenset()
    """outputs of the role that `observe` reads, such as `features_NH`, in addition to those of the losses"""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "warmup", "min_lr_ratio", "max_grad_norm")
        finite(self, "lr", "warmup")
        at_most(1, self, "min_lr_ratio")

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> torch.optim.Optimizer:
        """Return the optimizer over all of these parameters, each in one group.

        Args:
            named_parameters: the trained parameters, `model.…` and `heads.…`; shards of them under some strategies (DTensor).
            total_steps: optimizer steps in the whole run.

        The `lr` of each group is its peak: core multiplies it with the factor of the schedule before each step.
        """
        raise NotImplementedError

    def observe(self, batch: Batch, outputs: Outputs, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what is wanted of one micro-batch, by name. Called before its backward pass, where `observes` is true.

        Args:
            batch: the rows, with their extras.
            outputs: the role's outputs of these rows, with their graph.
            values: the values of each loss, (N, T), (N,) or one per unit, by the loss's name; with their graph.

        Core adds the values of all micro-batches and ranks: return sums over rows. A value whose name has a shape per row, such
        as `features_NH` or `row_N`, is not added: the rows of all micro-batches and ranks are concatenated, in the order of
        the data. So neither micro-batches nor ranks change what `receive` gets.
        """
        raise NotImplementedError

    def receive(self, optimizer: Any, sums: Mapping[str, Tensor]) -> None:
        """Hand `optimizer` the sums and rows of a whole optimizer step, just before `step` (and in each call of its closure).

        All tensors are on the CPU."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(OptimizerProvider):
    """AdamW (Loshchilov and Hutter 2019). Biases, norms and other vectors are never decayed."""

    weight_decay: float = 0.0
    """decoupled decay of matrices"""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments"""
    eps: float = 1e-8
    """AdamW's epsilon"""

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "weight_decay", "eps")
        finite(self, "weight_decay", "eps")

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> torch.optim.Optimizer:
        groups = parameter_groups(named_parameters, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


def parameter_groups(named_parameters: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return groups for torch's optimizers: matrices are decayed; biases, norms and other vectors are not.

    Empty groups are left out.
    """
    parameters = [parameter for _, parameter in named_parameters]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
