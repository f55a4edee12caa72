"""Base class of `omd`, `omd_cg` and `mle`: an estimator runs on the features of a reward model's head.

The body is frozen. Features of all pairs of a step reach the estimator in the order of the data, from every rank, and each rank
takes the same step. So neither ranks nor micro-batches change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.optimizers import OptimizerProvider
from rlhf_core.errors import UsageError, options_under, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from rlhf_algos.one_pass import Estimator
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["HeadOptimizer"]


@dataclass(frozen=True)
class HeadOptimizer(OptimizerProvider):
    """An estimator of the head of a reward model whose body is frozen."""

    lr: float = 1.0
    """step size eta"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """schedule of the step size: constant, linear decay, or half-cosine decay, to `min_lr_ratio` of eta"""
    max_grad_norm: float = 0.0
    """no effect: the step is computed from features, not from a gradient that core can clip"""
    start: Literal["zero", "head"] = "zero"
    """first iterate: zero, as in the paper, or the head's present weights"""
    state: str = ""
    """folder of an earlier run, or a checkpoint of one, whose estimator continues: theta, curvature and t; empty starts
    a new one"""

    observes: ClassVar[bool] = True
    hands_on: ClassVar[bool] = True
    outputs: ClassVar[frozenset[str]] = frozenset({"features_NH"})
    one_pass: ClassVar[bool] = True
    config_defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1.0}
    grows: ClassVar[bool] = False
    """True if the state grows with the pairs"""

    @property
    def averages(self) -> bool:
        """True if the mean of all iterates is written into the head."""
        return False

    def estimator(self, d: int, theta_D: Tensor | None) -> Estimator:
        """Return the estimator of `d` features that begins at `theta_D`; at zero if absent."""
        raise NotImplementedError

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> torch.optim.Optimizer:
        from rlhf_algos.one_pass.head_step import HeadStep
        from rlhf_algos.one_pass.sharding import is_sharded, whole
        from rlhf_algos.one_pass.store import read_state

        named = list(named_parameters)
        weight = self._head(named)
        if self.grows and is_sharded(weight):
            raise UsageError(
                "this optimizer keeps all pairs, but a sharded checkpoint can only store states of a fixed size; "
                f"use {run_option('strategy', 'torch')} or the optimizer omd"
            )
        theta_D = whole(weight)[0].cpu() if self.start == "head" else None
        estimator = self.estimator(weight.shape[1], theta_D)
        if self.state:
            with options_under("state"):
                estimator.load_state_dict(read_state(self.state))
        return HeadStep([parameter for _, parameter in named], weight, self.lr, estimator, self.averages)

    def _head(self, named: list[tuple[str, Parameter]]) -> Parameter:
        """Return the head's matrix (1, H).

        Raises:
            UsageError: something else is trained, too.
        """
        heads = [parameter for _, parameter in named if parameter.dim() == 2 and parameter.shape[0] == 1]
        others = [name for name, parameter in named if parameter.numel() > 1 and parameter not in set(heads)]
        if len(heads) != 1 or others:
            first = f", such as {others[0].removeprefix('model.')}" if others else ""
            raise UsageError(
                f"this optimizer trains only the head of a reward model, but {len(named) - 1} other tensors are "
                f"trained too{first}; pass {run_option('reward.freeze', 'body')}, or use the optimizer "
                "omd_memoryless"
            )
        return heads[0]

    def observe(self, batch: Batch, outputs: Outputs, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        check_pairs_loss(outputs, values)
        row_N = batch.extras.get("row_N", torch.full((len(batch),), -1))
        return {"features_NH": outputs["features_NH"].double(), "row_N": row_N}

    def receive(self, optimizer: Any, sums: Mapping[str, Tensor]) -> None:
        optimizer.receive(sums["features_NH"], sums["row_N"])


def check_pairs_loss(outputs: Outputs, values: Mapping[str, Tensor]) -> None:
    """Check that the one loss is the Bradley-Terry loss of the scores of pairs.

    Raises:
        UsageError: it is not; with a margin, for example.
    """
    if len(values) == 1 and "scores_N" in outputs:
        (values_B,), scores_N = values.values(), outputs["scores_N"].detach()
        expected_B = torch.nn.functional.softplus(scores_N[1::2] - scores_N[0::2])
        if values_B.shape == expected_B.shape and torch.allclose(
            values_B.detach(), expected_B, rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            return
    raise UsageError(
        "this optimizer can only minimize the Bradley-Terry loss of a reward model; use "
        f"{run_option('loss', 'bradley_terry')} without margin and center"
    )
