"""Copies of linear layers' weights in the dtype that autocast computes in, made once and not at every decoding step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import nn

__all__ = ["narrow_weights"]


@contextmanager
def narrow_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, linear layers with wider weights compute from copies in `dtype`, as autocast would cast them at every step.

    Everything else stays as it is, so that the numbers are those of autocast.
    """
    held: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                for name in ("weight", "bias"):
                    parameter = module._parameters[name]
                    if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                        held.append((module, name, parameter))
                        module._parameters[name] = parameter.detach().to(dtype)  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
