"""An exponential moving average of what a role trains (Polyak and Juditsky 1992): a_t = decay a_(t-1) + (1 - decay) w_t.

It begins at the first weights, is kept in float32 whatever the model is in, and is a part of the module: checkpoints have it
and devices move it. It is never trained and nothing samples from it; an export may write it.

Parameters are looked up by name at each use, since a strategy may put other objects in their place. Under one that shards, the
average is sharded in the same way (`begin`), and an export gathers it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average(nn.Module):
    """The average of the parameters of `module` that are trained."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.names = tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)
        for name in self.names:
            self.register_buffer(_key(name), _wide_copy(module.get_parameter(name)))

    def follows(self, module: nn.Module) -> bool:
        """Return False if `module` no longer holds its parameters, or their shares, under their own names and shapes.

        Some strategies flatten parameters, or free them between forward passes (DeepSpeed's stage 3).
        """
        now = dict(module.named_parameters(remove_duplicate=False))
        return all(name in now and now[name].shape == average.shape for name, average in self.by_name().items())

    def begin(self, module: nn.Module) -> None:
        """Start at the weights as a strategy has placed them: sharded where they are."""
        for name in self.names:
            setattr(self, _key(name), _wide_copy(module.get_parameter(name)))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the weights as they are now into the average."""
        for name, average in self.by_name().items():
            average.lerp_(module.get_parameter(name).float(), 1 - self.decay)

    def by_name(self) -> dict[str, Tensor]:
        """Return the averages by their parameters' names, float32."""
        return {name: self.get_buffer(_key(name)) for name in self.names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            moved: Any = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self


def _wide_copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().float().clone()


def _key(name: str) -> str:
    """Return a parameter's name as a buffer's, which may have no dots."""
    return name.replace(".", "/")
