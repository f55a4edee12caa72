"""Counts the bytes of tensors while operations run, and remembers the most at a time.

A storage counts from the operation that made it until nothing refers to it. Inside a `FakeTensorMode` no memory is taken, and
what is counted are the operations on shapes. Temporary memory inside an operation is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn  # noqa: TID253  a base class is needed at once; only what runs passes imports this module
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253
from torch.utils._pytree import tree_leaves  # noqa: TID253

__all__ = ["MemoryTracker"]


class MemoryTracker(TorchDispatchMode):
    """Live bytes of the storages that operations make while it is active.

    Args:
        module: its parameters and buffers are not counted, though operations return views of them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """bytes"""
        self.gradients = 0
        """bytes of them that hold gradients; see `watch_gradients`"""
        self.peak = 0
        """most of `live` since `restart`"""
        self.peak_besides = 0
        """most of `live` less `gradients` since `restart`"""
        self._sizes: dict[int, int] = {}
        self._gradients: dict[int, int] = {}
        for each in (*module.parameters(), *module.buffers()):
            self._add(each.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._add(storage, storage.nbytes())
        self._note()
        return found

    def watch_gradients(self, module: nn.Module) -> None:
        """Count as gradients what backward passes leave in the parameters of `module`."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def restart(self) -> None:
        """Begin a new maximum."""
        self.peak, self.peak_besides = self.live, self.live - self.gradients

    def _take_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter, unless it is there since an earlier pass."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self._gradients:
            self._gradients[storage._cdata] = storage.nbytes()
            self.gradients += storage.nbytes()

    def _note(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peak_besides = max(self.peak_besides, self.live - self.gradients)

    def _add(self, storage: Any, size: int) -> None:
        """Count a storage until it is freed; its address may then be that of another one."""
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size
            self.live += size
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self.gradients -= self._gradients.pop(key, 0)
