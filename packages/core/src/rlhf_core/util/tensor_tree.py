"""Trees of plain values and tensors: written to one safetensors file, read back, and copied into CPU memory.

A tree is what `state_dict()` returns: dictionaries, lists and tuples around tensors, numbers, texts and None. Its tensors
are stored under their paths (`state.0.exp_avg`), each memory once however many names it has (tied weights); the rest
is JSON in the file's metadata. Nothing here pickles, so reading a file runs no code from its author.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Copies",
    "plain_tree",
    "read_stored_tree",
    "read_tree",
    "same_tree",
    "tree_from_bytes",
    "tree_to_bytes",
    "write_tree",
]


def write_tree(path: str | Path, tree: Any) -> None:
    """Write `tree` to the safetensors file `path`."""
    from safetensors.torch import save_file

    tensors, skeleton = _take_apart(tree)
    save_file(tensors, path, metadata={"tree": skeleton})


def tree_to_bytes(tree: Any) -> bytes:
    """Return the content of the file that `write_tree` would write."""
    from safetensors.torch import save

    tensors, skeleton = _take_apart(tree)
    return save(tensors, metadata={"tree": skeleton})


def tree_from_bytes(data: bytes) -> Any:
    """Return the tree in what `tree_to_bytes` returned."""
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")  # of the header of a safetensors file
    header = json.loads(data[8 : 8 + length])
    return _from_json(json.loads(header["__metadata__"]["tree"]), load(data))


def _take_apart(tree: Any) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a tree by name, and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def name(where: str, tensor: Tensor) -> _Name:
        while where in tensors:  # of two keys such as "a.b" and "a" with "b" below it
            where += "'"
        first = names.setdefault(_memory(tensor), where)
        if first == where:
            tensors[where] = tensor.detach().contiguous()
        return _Name(first)

    return tensors, json.dumps(_to_json(_map_tensors(name, tree)))


def read_tree(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """The tree in `path`, its tensors on `device`."""
    from safetensors import safe_open

    with safe_open(path, "pt", device=str(device)) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        return _from_json(json.loads(file.metadata()["tree"]), tensors)


def read_stored_tree(path: str | Path) -> Any:
    """The tree in `path` without reading its tensors: each is a slice object of safetensors, read by `stored[a:b]`."""
    from safetensors import safe_open

    opened: Any = safe_open(path, "pt")
    file = opened.__enter__()  # its memory map lives as long as the slices
    return _from_json(json.loads(file.metadata()["tree"]), _StoredTensor(file))


class _StoredTensor(dict[str, Any]):
    """Slice objects of a safetensors file by name."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file

    def __missing__(self, name: str) -> Any:
        return self._file.get_slice(name)


def plain_tree(tree: Any, clone: bool = False, where: str = "") -> Any:
    """Return `tree` in new dictionaries and lists, as `write_tree` writes it; with `clone`, its tensors copied to the CPU.

    Raises:
        TypeError: it holds something that a file cannot, or a key that is no text or number; the message states where.
    """
    place = f" at {where.strip('.')!r}" if where else ""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True) if clone else tree.detach()
    if isinstance(tree, Mapping):
        for key in tree:
            if not isinstance(key, (str, int, float)):
                raise TypeError(f"the key {key!r}{place} is a {type(key).__name__}; use a string or a number")
        return {key: plain_tree(value, clone, f"{where}.{key}") for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(plain_tree(value, clone, f"{where}.{i}") for i, value in enumerate(tree))
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise TypeError(
        f"a {type(tree).__name__}{place} cannot be stored; use dictionaries, lists, tuples, numbers, strings, None "
        "and tensors"
    )


def same_tree(one: Any, other: Any) -> bool:
    """Return True if two plain trees are equal, their tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other)))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_tree(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_tree, one, other))
    return bool(one == other) or (one != one and other != other)  # nan is nan


class Copies:
    """CPU memory that a tree's tensors are copied into, again and again: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tree: Any) -> Any:
        """`tree` with its tensors in separate memory, until the next call. Memory with two names is copied once."""
        taken: dict[Any, Tensor] = {}

        def copy(where: str, tensor: Tensor) -> Tensor:
            memory = _memory(tensor)
            if memory not in taken:
                taken[memory] = self._buffer(where, tensor).copy_(tensor.detach(), non_blocking=True)
            return taken[memory]

        copied = _map_tensors(copy, tree)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies into pinned memory only began
        return copied

    def _buffer(self, where: str, tensor: Tensor) -> Tensor:
        """Memory for the tensor at `where`: that of last time, if it still fits. Pinned for what is on a GPU."""
        old = self._buffers.get(where)
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[where] = old
        return old


class _Name(str):
    """Stands for a tensor in a skeleton."""


def _memory(tensor: Tensor) -> Any:
    """Return an identity of the tensor's memory, equal only for two names of one tensor."""
    if not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _map_tensors(change: Callable[[str, Tensor], Any], tree: Any, path: str = "") -> Any:
    """`tree` with each tensor replaced by `change(path, tensor)`."""
    if isinstance(tree, torch.Tensor):
        return change(path, tree)
    below = f"{path}." if path else ""
    if isinstance(tree, dict):
        return {key: _map_tensors(change, value, f"{below}{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map_tensors(change, value, f"{below}{i}") for i, value in enumerate(tree))
    return tree


def _to_json(tree: Any) -> Any:
    """`tree` in what JSON has: keys of any kind, tuples and names of tensors keep their types."""
    match tree:
        case _Name():
            return {"tensor": str(tree)}
        case dict():
            return {"dict": [[key, _to_json(value)] for key, value in tree.items()]}
        case tuple():
            return {"tuple": [_to_json(value) for value in tree]}
        case list():
            return [_to_json(value) for value in tree]
    return tree


def _from_json(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Invert `_to_json`."""
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _from_json(value, tensors) for key, value in items}
        case {"tuple": values}:
            return tuple(_from_json(value, tensors) for value in values)
        case list():
            return [_from_json(value, tensors) for value in tree]
    return tree
