"""States of a role that leave their device and come back in place.

DeepSpeed keeps each number once, in flat buffers, and everything else (parameters, shards, masters, gradients) is a view of
them. Moving the memory of a buffer, and not the tensors, keeps every view valid. So one rule serves every stage, precision and
frozen role, whatever DeepSpeed can move itself.

Left out: memory that its owner cannot resize, such as a mapped file. Such memory is not on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Parking"]

CONTAINERS = (list, tuple, set, deque)


class Parking:
    """The memory of an engine's states, while it is away from `device`."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine = engine
        self.device = device
        self._away: list[tuple[Any, Tensor]] = []

    def leave(self) -> None:
        """Copy all states to main memory and free theirs. States that are away already stay there."""
        for storage in self._storages():
            held = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            held.untyped_storage().copy_(storage)
            storage.resize_(0)
            self._away.append((storage, held))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def come_back(self) -> None:
        """Bring back what left."""
        for storage, held in self._away:
            storage.resize_(held.numel())
            storage.copy_(held.untyped_storage())
        self._away = []

    def _storages(self) -> Iterator[Any]:
        """Memory on the device, each piece once."""
        seen: set[int] = set()
        module, optimizer = self.engine.module, self.engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)  # torch's, around which ZeRO puts its own
        roots = [list(module.parameters()), list(module.buffers()), optimizer, getattr(inner, "state", None)]
        for tensor in _tensors(roots, set()):
            storage = tensor.untyped_storage()
            known = storage._cdata in seen
            if not known and storage.device.type == self.device.type and storage.nbytes() and storage.resizable():
                seen.add(storage._cdata)
                yield storage


def _tensors(root: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors that can be reached from `root`: through containers, attributes of DeepSpeed's own objects, and what DeepSpeed
    attaches to a parameter."""
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            yield thing
            waiting += [thing.grad if thing.is_leaf else None, *vars(thing).values()]
        elif isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, CONTAINERS):
            waiting += thing
        elif type(thing).__module__.startswith("deepspeed.runtime") and not isinstance(thing, torch.nn.Module):
            waiting += getattr(thing, "__dict__", {}).values()
