"""A role's optimizer as a strategy holds it: made by its provider, stepped with core's schedule, and restored to the bit.

    optimizer = make_optimizer(module, optim, total_steps)
    schedule = Schedule(optimizer, optim, total_steps)
    ...
    lr = schedule.set(steps_done)      # each group's peak learning rate times the factor
    optimizer.step()

All of it works on whole parameters and on shards of them (DTensor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import nn

    from rlhf_core.contract.optimizers import OptimizerProvider

__all__ = ["Schedule", "load_optimizer", "lr_factor", "make_optimizer"]


def make_optimizer(module: nn.Module, optim: OptimizerProvider, total_steps: int) -> torch.optim.Optimizer:
    """Return the optimizer of `optim` over the trained parameters of `module`.

    Raises:
        ContractError: it leaves a trained parameter out, or has one twice.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    optimizer = optim(named, total_steps)
    who = f"optimizer {type(optim).__qualname__} of {type(optim).__module__}"
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ContractError(f"{who} returned {type(optimizer).__name__}; an optimizer returns a torch.optim.Optimizer")
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    missing = [name for name, parameter in named if id(parameter) not in held]
    if missing or len(held) != len(named):
        left_out = f"omits {missing[0]}" if missing else "contains unknown parameters, or one of them twice"
        raise ContractError(f"{who} {left_out}; put each of the {len(named)} trained parameters into exactly one group")
    return optimizer


def lr_factor(optim: OptimizerProvider, step: int, total: int) -> float:
    """Return the factor of the peak learning rate at optimizer step `step` (from 0) of `total`; 0..1.

    Linear warm-up reaches 1 at the first step after it. Linear and cosine then fall towards `min_lr_ratio`, which they would
    reach one step after the last, as Hugging Face's do: no step of a run has learning rate 0.
    """
    warmup = round(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    falling = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling


class Schedule:
    """The learning rates of an optimizer's groups over a run.

    Args:
        optimizer: just made; the `lr` of each group is its peak.
        optim: its provider.
        total_steps: optimizer steps in the whole run.
    """

    def __init__(self, optimizer: Any, optim: OptimizerProvider, total_steps: int) -> None:
        self.optimizer = optimizer
        self.optim = optim
        self.total_steps = total_steps
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def lr(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0, where the peak is `optim.lr`."""
        return self.optim.lr * lr_factor(self.optim, step, self.total_steps)

    def set(self, step: int) -> float:
        """Set every group's learning rate for optimizer step `step`, counted from 0; return that of `optim.lr`."""
        factor = lr_factor(self.optim, step, self.total_steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return self.lr(step)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore what `optimizer.state_dict()` gave. Tensors keep the dtype that they were saved in.

    torch's own `load_state_dict` casts them to that of the parameter, which would change a float64 state.
    """
    optimizer.load_state_dict(dict(state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, saved in state["state"].items():
        own = optimizer.state[parameters[number]]
        for name, value in saved.items():
            if isinstance(value, torch.Tensor) and own[name].dtype != value.dtype:
                own[name] = value.to(own[name].device)
