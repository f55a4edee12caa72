"""A key-value cache that keeps room for the tokens to come.

transformers' dynamic layer copies everything it holds at every token; this one copies once in a while and appends in
place. Only plain layers are replaced: sliding windows, recurrent states and whatever else an architecture has stay as
transformers makes them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor  # noqa: TID253  base classes are needed at once; only a method that samples imports this module
from transformers import DynamicCache, PretrainedConfig  # noqa: TID253
from transformers.cache_utils import DynamicLayer  # noqa: TID253

__all__ = ["RoomyLayer", "make_cache"]


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model of `config`."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """A dynamic layer whose keys and values are views into larger buffers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._view: Tensor | None = None
        """the keys as `update` left them: whoever changes the rows or the length puts other tensors in their place"""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new states; returns all of them, (batch, heads, length, dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._buffers is None or self.keys is not self._view or end > self._buffers[0].shape[-2]:
            room = end + 64 + end // 8  # at most an eighth is wasted, and a copy is rare
            self._buffers = _grow_buffer(self.keys, key_states, room), _grow_buffer(self.values, value_states, room)
        keys, values = self._buffers
        keys[:, :, length:end] = key_states
        values[:, :, length:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        self._view = self.keys
        return self.keys, self.values


def _grow_buffer(held: Tensor, new: Tensor, room: int) -> Tensor:
    """A buffer of `room` tokens that begins with what is `held`."""
    buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
    if held.numel():
        buffer[:, :, : held.shape[-2]] = held
    return buffer
