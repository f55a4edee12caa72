"""Loading a model of transformers whose weights stay in their safetensors files until they are needed.

transformers makes the model, matches names, ties weights and computes buffers as always. It only gets placeholders where it
would get what a file holds. A parameter that ends up with a placeholder's memory is that tensor of that file.

transformers opens its files with `safe_open`, which is replaced meanwhile. A version that reads files in another way loads
whole weights, as without deferring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.models.loading.deferral import defer, is_deferring, placeholder, report_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["load_deferred"]

Handed = dict[int, tuple["_FileTensor", Any]]
"""Tensors of files by the address of their placeholder's memory; the placeholder is kept, and so is the address."""


def load_deferred(name: str, load: Callable[[], tuple[Any, Any]], packed: bool) -> tuple[Any, Any]:
    """Return what `load` returns, a model and what transformers reports; inside `defer_weights` without its weights.

    Args:
        name: of the model, for messages.
        load: a call of `from_pretrained`; it is repeated if the weights cannot be deferred.
        packed: True if it quantizes the weights.
    """
    if not is_deferring():
        return load()
    if packed:
        report_whole(f"those of {name} are quantized as they are read")
        return load()
    handed: Handed = {}
    with _hand_placeholders(handed):
        model, info = load()
    if any(hasattr(each, "operations") for each in model._weight_conversions):  # a renaming has none
        del model
        report_whole(f"transformers converts those of {name} as it reads them")
        return load()
    for parameter in model.parameters():
        stored = handed.get(parameter.untyped_storage().data_ptr())
        if stored is not None:
            defer(parameter, partial(stored[0].read, parameter.dtype))
    for buffer in model.buffers():
        stored = handed.get(buffer.untyped_storage().data_ptr())
        if stored is not None:
            buffer.data = stored[0].read(buffer.dtype)
    return model, info


@dataclass(frozen=True)
class _FileTensor:
    """A tensor of a file, as transformers uses one: it takes a slice of it, and then moves that."""

    file: str
    key: str
    slice: Any
    """slice of safetensors, which knows shape and dtype"""
    handed: Handed

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers in new memory."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt", device="cpu") as opened:
            found: Tensor = opened.get_tensor(self.key).to(dtype, copy=True)
        return found

    def get_shape(self) -> list[int]:
        """Return the shape, as safetensors' own slices do."""
        shape: list[int] = self.slice.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return the name of the dtype, as safetensors' own slices do."""
        return str(self.slice.get_dtype())

    def __getitem__(self, _: Any) -> _FileTensor:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return a placeholder."""
        made = placeholder(tuple(self.get_shape()), dtype or self.slice[:0].dtype)
        self.handed[made.untyped_storage().data_ptr()] = (self, made)
        return made


class _File:
    """An open file that hands out placeholders."""

    def __init__(self, name: str, opened: Any, handed: Handed) -> None:
        self.name, self.opened, self.handed = name, opened, handed

    def keys(self) -> Any:
        return self.opened.keys()

    def metadata(self) -> Any:
        return self.opened.metadata()

    def get_tensor(self, key: str) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(key)
        return tensor

    def get_slice(self, key: str) -> _FileTensor:
        return _FileTensor(self.name, key, self.opened.get_slice(key), self.handed)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.__exit__(*error)


@contextmanager
def _hand_placeholders(handed: Handed) -> Iterator[None]:
    """Let transformers get placeholders from files that it opens inside the context."""
    from transformers import modeling_utils as using

    modeling_utils: Any = using  # `safe_open` is no public name of it
    original = modeling_utils.safe_open

    def opened(name: str, **options: Any) -> _File:
        return _File(name, original(name, **options), handed)

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = original
