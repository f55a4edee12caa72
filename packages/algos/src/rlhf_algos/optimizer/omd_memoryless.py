"""The memoryless approximation of one-pass reward modeling, on a head, adapters or a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_algos.one_pass.damping import Strategy
from rlhf_core.contract.optimizers import OptimizerProvider
from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch.nn import Parameter

__all__ = ["OMDMemoryless"]


@dataclass(frozen=True)
class OMDMemoryless(OptimizerProvider):
    """A damped Newton step on the current batch alone (Li et al. 2025, Algorithm 5), by conjugate gradient on Hessian products.

    It trains whatever the role trains: a head, adapters, or the whole model. Products are double backward passes over the
    whole batch, so that a step costs `num_cg_steps` of them and one gradient.
    """

    lr: float = 1e-3
    """step size eta"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """schedule of the step size: constant, linear decay, or half-cosine decay, to `min_lr_ratio` of eta"""
    max_grad_norm: float = 0.0
    """norm to which the gradient is clipped before the system is solved; 0 does not clip"""
    damping: float = 0.8
    """ridge lambda_0 in place of past curvature; 0 or above"""
    damping_strategy: Strategy = "linear"
    """growth of the ridge to `damping`: constant, linear, log, square or cosine"""
    damping_growth_rate: float = 1.0
    """number of steps after which the ridge equals `damping`; a value of 1 or less means all steps of the run"""
    num_cg_steps: int = 3
    """maximum number of conjugate gradient steps per update"""
    use_hvp: bool = True
    """take the second-order step; False takes the gradient itself, which is sgd"""
    compat: Literal["paper", "released"] = "paper"
    """`released` computes what the authors' code does: another iteration, a constant ridge, a mixed step, a gate"""

    closure: ClassVar[bool] = True
    one_pass: ClassVar[bool] = True
    config_defaults: ClassVar[Mapping[str, Any]] = {"epochs": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "damping", "damping_growth_rate")
        finite(self, "damping", "damping_growth_rate")
        at_least(1, self, "num_cg_steps")

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]], total_steps: int) -> torch.optim.Optimizer:
        from rlhf_algos.one_pass import Direction
        from rlhf_algos.one_pass.memoryless_step import MemorylessStep

        how = Direction(
            self.damping,
            self.damping_strategy,
            self.damping_growth_rate,
            self.num_cg_steps if self.use_hvp else 0,
            self.compat == "released",
        )
        return MemorylessStep([parameter for _, parameter in named_parameters], self.lr, how, total_steps)
