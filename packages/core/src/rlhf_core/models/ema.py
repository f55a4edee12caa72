"""An exponential moving average of what a role trains (Polyak and Juditsky 1992): a_t = decay a_(t-1) + (1 - decay) w_t.

It begins at the first weights, is kept in float32 whatever the model is in, and is a part of the module: checkpoints have it
and devices move it. It is never trained and nothing samples from it; an export may write it.

Parameters are looked up by name at each use, since a strategy may put other objects in their place. Under one that shards, the
average is sharded in the same way (`Trainable.own_share`), and an export gathers it (`Trainable.join_shares`). It is empty
until a strategy has placed the weights, so that no whole copy of them is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Average"]

Held = Callable[[Tensor], Tensor]
"""this rank's share of a parameter, without gradient"""


class Average(nn.Module):
    """The average of the parameters of `module` that are trained; empty until `begin`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
        for name in self.names:
            self.register_buffer(_key(name), torch.empty(0))

    def follows(self, module: nn.Module, held: Held = torch.Tensor.detach) -> bool:
        """Return False if `module` no longer has its parameters under their own names, or a rank holds no share of one.

        Some strategies flatten parameters, or free them between forward passes.
        """
        now = dict(module.named_parameters(remove_duplicate=False))
        return all(name in now and held(now[name]).numel() > 0 for name in self.names)

    def begin(self, module: nn.Module, held: Held = torch.Tensor.detach) -> None:
        """Start at the weights as a strategy has placed them; `held` gives this rank's share of a parameter."""
        for name in self.names:
            setattr(self, _key(name), held(module.get_parameter(name)).detach().float().clone())

    @torch.no_grad()
    def update(self, module: nn.Module, held: Held = torch.Tensor.detach) -> None:
        """Take the weights as they are now into the average."""
        for name, average in self.by_name().items():
            average.lerp_(held(module.get_parameter(name)).float(), 1 - self.decay)

    def by_name(self) -> dict[str, Tensor]:
        """Return the averages by their parameters' names, or this rank's shares of them; float32."""
        return {name: self.get_buffer(_key(name)) for name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            moved: Any = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self


def _key(name: str) -> str:
    """Return a parameter's name as a buffer's, which must not have dots."""
    return name.replace(".", "/")
