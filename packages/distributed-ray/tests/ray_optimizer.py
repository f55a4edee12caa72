"""An optimizer that observes a step and evaluates it again, for runs whose workers find it by `ray_optimizer:Lookahead`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_core import Batch, OptimizerProvider, Outputs


class _Lookahead(torch.optim.SGD):
    """Korpelevich's extragradient step, whose length is the step size times `scale`."""

    scale = 1.0

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = self.param_groups[0]["params"]
        before = [parameter.detach().clone() for parameter in parameters]
        super().step()
        closure()
        with torch.no_grad():
            for parameter, start in zip(parameters, before, strict=True):
                parameter.grad *= self.scale
                parameter.copy_(start)
        super().step()
        return loss


@dataclass(frozen=True)
class Lookahead(OptimizerProvider):
    """Extragradient descent whose steps are longer where the policy's entropy is high, in nats per token of the whole step."""

    lr: float = 0.3
    """step size"""

    closure: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    outputs: ClassVar[frozenset[str]] = frozenset({"entropy_NT"})

    def __call__(self, named: Iterable[tuple[str, torch.nn.Parameter]], total_steps: int) -> torch.optim.Optimizer:
        return _Lookahead([parameter for _, parameter in named], lr=self.lr)

    def observe(self, batch: Batch, outputs: Outputs, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        entropy_NT = torch.where(batch.mask_NT, outputs["entropy_NT"].detach(), 0.0)
        return {"tokens": batch.mask_NT.sum().double(), "entropy": entropy_NT.double().sum()}

    def receive(self, optimizer: Any, sums: Mapping[str, Tensor]) -> None:
        optimizer.scale = float(sums["entropy"] / sums["tokens"])
