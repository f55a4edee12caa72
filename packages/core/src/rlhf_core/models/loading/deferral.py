"""Weights that are read when they are needed, for strategies whose ranks each keep a share of a model.

    with defer_weights():
        module = build()                      # parameters have shapes and dtypes, and no memory
    for parameter in module.parameters():
        read_weight(parameter)                # its numbers, from a file or a seed; then a rank keeps its share

A deferred parameter is one zero, expanded to the parameter's shape. Its numbers are those that it has without deferring, to the
bit. What changes weights while it builds a model (a merged adapter, new tokens) defers its change to the parameter's own read.

Left out: quantized weights, which are read at once, and adapters of kinds that look at the weights before they are merged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "compute_deferred",
    "defer",
    "defer_all",
    "defer_weights",
    "is_deferred",
    "is_deferring",
    "placeholder",
    "read_later",
    "read_weight",
    "read_whole",
    "replace_parameters",
    "report_whole",
]

_DEFERRING: ContextVar[bool] = ContextVar("deferring", default=False)


@cache
def _reads() -> Any:
    """Return the functions that read deferred parameters; a model that is dropped takes its entries along."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


@contextmanager
def defer_weights() -> Iterator[None]:
    """Load models without their weights inside the context, where that is possible."""
    token = _DEFERRING.set(True)
    try:
        yield
    finally:
        _DEFERRING.reset(token)


def is_deferring() -> bool:
    """Return True inside `defer_weights`."""
    return _DEFERRING.get()


def placeholder(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros of a shape in the memory of one."""
    return torch.zeros((), dtype=dtype).expand(shape)


def defer(parameter: Tensor, read: Callable[[], Tensor]) -> None:
    """Let `parameter`, which is a `placeholder`, get what `read` returns: its numbers, in new memory on the CPU."""
    _reads()[parameter] = read


def defer_all(model: nn.Module, read: Callable[[str, torch.Size], Tensor]) -> None:
    """Replace all parameters of a model on the meta device by deferred ones; tied ones stay tied.

    Args:
        model: changed in place.
        read: (name, shape) -> the numbers, in the parameter's dtype.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        made[parameter] = torch.nn.Parameter(placeholder(parameter.shape, parameter.dtype))
        defer(made[parameter], partial(read, name, parameter.shape))
    replace_parameters(model, made)


def replace_parameters(model: nn.Module, made: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put others in the place of parameters of a model, wherever its modules hold them."""
    for part in model.modules():
        for name, own in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if own in made:
                setattr(part, name, made[own])


def is_deferred(parameter: Tensor) -> bool:
    """Return True if the parameter has no numbers yet."""
    return parameter in _reads()


def read_later(parameter: Tensor) -> Callable[[], Tensor]:
    """Return the function that returns a parameter's numbers: the deferred ones, or those that it has now."""
    data = parameter.data
    return _reads().get(parameter) or (lambda: data)


def read_weight(parameter: Tensor) -> None:
    """Give a deferred parameter its numbers. One that has them stays as it is."""
    read = _reads().pop(parameter, None)
    if read is not None:
        parameter.data = read()


def read_whole(model: nn.Module, reason: str) -> None:
    """Give all deferred parameters of a model their numbers, and log the reason if there are any.

    Args:
        model: of transformers, or a part of one.
        reason: the end of a sentence.
    """
    deferred = [parameter for parameter in model.parameters() if is_deferred(parameter)]
    if deferred:
        report_whole(reason)
    for parameter in deferred:
        read_weight(parameter)


def report_whole(reason: str) -> None:
    """Log on the first rank why every rank holds whole weights for a while."""
    if int(os.environ.get("RANK", "0")) == 0:
        log.info(f"every rank loads whole weights before it keeps its share: {reason}")


@contextmanager
def compute_deferred(model: nn.Module) -> Iterator[bool]:
    """Let the modules of a deferred model read their weights when they run, and drop them afterwards.

    Yields:
        True if any weights are deferred.
    """
    with ExitStack() as hooks:
        found = False
        for module in model.modules():
            own = [each for each in module.parameters(recurse=False) if is_deferred(each)]
            if own:
                found = True
                hooks.callback(module.register_forward_pre_hook(_reader(own)).remove)
                hooks.callback(module.register_forward_hook(_dropper(own), always_call=True).remove)
        yield found


def _reader(parameters: list[nn.Parameter]) -> Callable[..., None]:
    def read(*_: Any) -> None:
        for parameter in parameters:
            parameter.data = _reads()[parameter]()

    return read


def _dropper(parameters: list[nn.Parameter]) -> Callable[..., None]:
    def drop(*_: Any) -> None:
        for parameter in parameters:
            parameter.data = placeholder(parameter.shape, parameter.dtype)

    return drop
