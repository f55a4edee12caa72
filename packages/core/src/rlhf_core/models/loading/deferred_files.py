"""Loading a model of transformers whose weights stay in their safetensors files until they are needed.

transformers makes the model, matches names, ties weights and computes buffers as always. It only gets placeholders where it
would get what a file holds. A parameter that ends up with a placeholder's memory is that tensor of that file. Where
transformers makes a parameter of several tensors (the experts of a layer), it first makes one of their shapes, and later one of
their numbers.

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

Handed = dict[int, tuple["_FileTensor | _Conversion", Any]]
"""Sources of numbers by the address of their placeholder's memory; the placeholder is kept, and so is the address."""


def load_deferred(name: str, load: Callable[[], tuple[Any, Any]], packed: bool) -> tuple[Any, Any]:
    """Return what `load` returns, a model and what transformers reports; inside `defer_weights` without its weights.

    Args:
        name: of the model, for messages.
        load: a call of `from_pretrained`.
        packed: True if it quantizes the weights.
    """
    if not is_deferring():
        return load()
    if packed:
        report_whole(f"those of {name} are quantized as they are read")
        return load()
    handed: Handed = {}
    with _hand_placeholders(handed), _convert_placeholders(handed), _compare_numbers(handed):
        model, info = load()
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


@dataclass(frozen=True)
class _Conversion:
    """A parameter that transformers makes of tensors of files."""

    convert: Callable[[], dict[str, Any]]
    """reads the tensors, and returns all parameters that are made of them"""
    name: str

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers in new memory."""
        found: Tensor = _single(self.convert()[self.name]).to(dtype).contiguous()
        return found


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


@contextmanager
def _convert_placeholders(handed: Handed) -> Iterator[None]:
    """Let transformers make placeholders of placeholders inside the context, where it makes a parameter of several tensors."""
    from transformers.core_model_loading import WeightConverter

    converter: Any = WeightConverter  # whose method is replaced
    original = converter.convert

    def convert(self: Any, layer_name: str, model: Any = None, **known: Any) -> dict[str, Tensor]:
        tensors = self.materialize_tensors()
        files = {
            pattern: [(handed[each.untyped_storage().data_ptr()][0], each.dtype) for each in parts]
            for pattern, parts in tensors.items()
        }

        def from_files() -> dict[str, Any]:
            for pattern, parts in files.items():
                self.collected_tensors[pattern] = [partial(file.read, dtype) for file, dtype in parts]
            return dict(original(self, layer_name, model=shape_of, config=known.get("config")))

        shape_of = _ShapeOf(model, layer_name)
        for pattern, parts in tensors.items():
            self.collected_tensors[pattern] = [each.to("meta") for each in parts]
        made = {}
        for name, found in original(self, layer_name, model=model, **known).items():
            shape = _single(found)
            made[name] = placeholder(shape.shape, shape.dtype)
            handed[made[name].untyped_storage().data_ptr()] = (_Conversion(from_files, name), made[name])
        return made

    converter.convert = convert
    try:
        yield
    finally:
        converter.convert = original


@contextmanager
def _compare_numbers(handed: Handed) -> Iterator[None]:
    """Let transformers compare numbers inside the context, where it ties weights only if a file has both and they are equal."""
    import torch

    original = torch.equal

    def numbers(tensor: Tensor) -> Tensor:
        stored = handed.get(tensor.untyped_storage().data_ptr())
        return tensor if stored is None else stored[0].read(tensor.dtype)

    def equal(*pair: Tensor) -> bool:
        return original(*map(numbers, pair))

    changed: Any = torch  # whose function is replaced
    changed.equal = equal
    try:
        yield
    finally:
        changed.equal = original


class _ShapeOf:
    """A model for conversions that look at the shape of their parameter: that parameter, without numbers."""

    def __init__(self, model: Any, name: str) -> None:
        known = dict(model.named_parameters())
        self.parameters = {name: known[name].to("meta")} if name in known else {}

    def get_parameter(self, name: str) -> Tensor:
        """Return the parameter, on the meta device."""
        found: Tensor = self.parameters[name]
        return found


def _single(found: Any) -> Tensor:
    """Return a converted parameter, which some conversions wrap in a list."""
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor
