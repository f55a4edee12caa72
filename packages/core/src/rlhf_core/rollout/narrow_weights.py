"""Copies of linear layers' weights in the dtype that autocast computes in, made once per call and not at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Held", "computing_in", "narrow_weights", "wide_weights"]

Held = list[tuple["nn.Module", str, Any]]
"""parameters whose places copies take: module, name, parameter"""


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Autocast to `dtype` inside if weights are wider, as in training; yield what to change the model's weights inside of.

    Linear layers compute from copies that are made once: autocast in inference mode remembers none, and casts at every step.
    """
    if all(each.dtype == dtype for each in model.parameters() if each.is_floating_point()):
        yield nullcontext
        return
    copies: dict[tuple[nn.Module, str], Tensor] = {}
    narrow = dtype in (torch.bfloat16, torch.float16)
    narrowed = narrow_weights(model, dtype, copies) if narrow else nullcontext(list[Any]())
    with torch.autocast(next(model.parameters()).device.type, dtype), narrowed as held:
        yield partial(wide_weights, held, copies)


@contextmanager
def narrow_weights(model: nn.Module, dtype: torch.dtype, copies: dict[tuple[nn.Module, str], Tensor]) -> Iterator[Held]:
    """Inside, linear layers with wider weights compute from copies in `dtype`, as autocast would cast them at every step.

    Everything else stays as it is, so that the numbers are those of autocast. Yields what `wide_weights` needs.

    Args:
        copies: those of an earlier call, which keep their places and take the present weights; new ones are added.
    """
    held: Held = []
    try:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                for name in ("weight", "bias"):
                    parameter = module._parameters.get(name)  # a head of ours without a bias has no such entry
                    if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                        held.append((module, name, parameter))
                        module._parameters[name] = _copy_of(parameter, dtype, (module, name), copies)  # type: ignore[assignment]
        yield held
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter


@contextmanager
def wide_weights(held: Held, copies: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Inside, the parameters are back in their places and may change; then copies, where they were, take their numbers."""
    for module, name, parameter in held:
        module._parameters[name] = parameter
    yield
    for module, name, parameter in held:
        module._parameters[name] = _copy_of(parameter, copies[module, name].dtype, (module, name), copies)  # type: ignore[assignment]


def _copy_of(
    parameter: Tensor, dtype: torch.dtype, key: tuple[nn.Module, str], copies: dict[tuple[nn.Module, str], Tensor]
) -> Tensor:
    """Return the copy of a parameter, with its present numbers."""
    if key in copies:
        copies[key].copy_(parameter.detach())
    else:
        copies[key] = parameter.detach().to(dtype)
    return copies[key]
