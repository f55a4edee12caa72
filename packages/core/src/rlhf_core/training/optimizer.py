"""AdamW with the right decay groups, and learning-rate schedules as one function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import nn

    from rlhf_core.contract.options import Optim

__all__ = ["adamw", "lr_factor", "parameter_groups"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases, norms and other vectors are not. Frozen parameters are left out."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trained parameters of `module` (Loshchilov and Hutter 2019)."""
    groups = [group for group in parameter_groups(module, optim.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def lr_factor(optim: Optim, step: int, total: int) -> float:
    """What the peak learning rate is multiplied by at optimiser step `step` (from 0) of `total`; 0..1.

    Linear warm-up reaches 1 at the first step after it; linear and cosine then end at `min_lr_ratio` on the last step.
    """
    warmup = round(optim.warmup * total) if optim.warmup < 1 else int(optim.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    falling = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling
