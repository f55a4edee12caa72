"""An exponential moving average of what a role trains (Polyak and Juditsky 1992): a_t = decay a_(t-1) + (1 - decay) w_t.

It begins at the first weights, is kept in float32 whatever the model is in, and is a part of the module: checkpoints have it
and devices move it. It is never trained and nothing samples from it; an export may write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average(nn.Module):
    """The average of the parameters of `module` that are trained."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._followed = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for name, parameter in self._followed:
            self.register_buffer(_key(name), parameter.detach().float().clone())

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        for average, parameter in self._pairs():
            average.lerp_(parameter.float(), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module with the averages as its weights, inside."""
        with torch.no_grad():
            kept = [parameter.clone() for _, parameter in self._followed]
            for average, parameter in self._pairs():
                parameter.copy_(average)
            try:
                yield
            finally:
                for value, (_, parameter) in zip(kept, self._followed, strict=True):
                    parameter.copy_(value)

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        """Averages and what they are of."""
        for name, parameter in self._followed:
            yield getattr(self, _key(name)), parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            moved: Any = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self


def _key(name: str) -> str:
    """A parameter's name as a buffer's, which may have no dots."""
    return name.replace(".", "/")
