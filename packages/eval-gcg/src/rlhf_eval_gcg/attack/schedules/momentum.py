"""Schedule `momentum`: GCG whose gradient remembers earlier steps (MAC, Zhang & Wei 2024, arXiv:2405.01229)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_eval_gcg.attack.optimizer import Suffix
from rlhf_eval_gcg.attack.schedules.gcg import Gcg

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Momentum", "remember"]


class Momentum(Gcg):
    """Draws candidates from momentum × earlier gradients + (1 - momentum) × the present one."""

    def candidates(self, suffix: Suffix, gradient_LV: Tensor) -> Tensor:
        """Return the candidates of the step (C, L)."""
        return super().candidates(suffix, remember(suffix, gradient_LV, self.options.momentum))


def remember(suffix: Suffix, gradient_LV: Tensor, share: float) -> Tensor:
    """Return the running mean of gradients (L, V), and keep it in the suffix's memory."""
    earlier = suffix.memory.get("momentum_LV")
    mean_LV = gradient_LV if earlier is None else share * earlier + (1 - share) * gradient_LV
    suffix.memory["momentum_LV"] = mean_LV
    return mean_LV
