"""A key-value cache with room for the tokens to come: a decoding step writes its own token and copies nothing.

transformers' dynamic layers copy everything they hold at every token. These append in place, to buffers that have the room of
a whole wave from the first decoding step on. A sliding window moves through a buffer of twice its size, and is copied once per
window. Recurrent states and whatever else an architecture has stay as transformers makes them.
"""

from __future__ import annotations

from typing import Any

import torch  # noqa: TID253  base classes are needed at once; only a method that samples imports this module
from torch import Tensor  # noqa: TID253
from transformers import DynamicCache, PretrainedConfig  # noqa: TID253
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: TID253

__all__ = ["RoomyLayer", "RoomySlidingLayer", "make_cache"]


def make_cache(config: PretrainedConfig, room: int = 0) -> DynamicCache:
    """Return an empty cache for a model of `config`, with `room` tokens per row; it grows beyond them if it must."""
    cache = DynamicCache(config=config)
    cache.layers = [_roomy(layer, room) for layer in cache.layers]
    return cache


def _roomy(layer: Any, room: int) -> Any:
    if type(layer) is DynamicLayer:
        return RoomyLayer(room)
    if type(layer) is DynamicSlidingWindowLayer:
        return RoomySlidingLayer(layer.sliding_window, room)
    return layer


class _Buffers:
    """The keys and values of a layer inside larger buffers, (rows, heads, capacity, dim).

    Args:
        capacity: tokens per row that a buffer has at least.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pair: tuple[Tensor, Tensor] | None = None
        self._end = 0
        """tokens of the buffers that are in use; the layer holds the last of them"""
        self._view: Tensor | None = None
        """the keys as the layer last had them: code that changes the rows or the length replaces them"""

    def append(self, held: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values of `held` and `new` tokens, one after the other."""
        length, more = held[0].shape[-2], new[0].shape[-2]
        if not length and self._pair is None:  # a prompt: rows may be repeated before a token is added
            return new
        own = self._pair is not None and held[0] is self._view
        begin = self._end - length if own else 0
        if own and self._pair is not None and self._end + more > self._pair[0].shape[-2]:
            own = length <= begin and length + more <= self._pair[0].shape[-2]
            if own:  # a window moves back to the beginning
                for buffer, old in zip(self._pair, held, strict=True):
                    buffer[:, :, :length] = old
            begin = 0
        if not own:
            self.place(held, length + more)
        assert self._pair is not None
        self._end = begin + length + more
        for buffer, states in zip(self._pair, new, strict=True):
            buffer[:, :, begin + length : self._end] = states
        keys, values = (buffer[:, :, begin : self._end] for buffer in self._pair)
        return keys, values

    def keep(self, keys: Tensor) -> None:
        """Remember that the layer holds `keys`, the last ones of what was appended."""
        self._view = keys

    def place(self, held: tuple[Tensor, Tensor], needed: int, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Copy `held`, or `rows` of it, into new buffers with room for `needed` tokens; return it there."""
        room = self._capacity if needed <= self._capacity else needed + 64 + needed // 8  # a copy is rare
        length, placed = held[0].shape[-2], []
        for old in held:
            count = len(old) if rows is None else len(rows)
            buffer = old.new_empty(count, old.shape[1], room, old.shape[-1])
            if length and rows is None:
                buffer[:, :, :length] = old
            elif length and rows is not None:
                torch.index_select(old, 0, rows, out=buffer[:, :, :length])
            placed.append(buffer)
        self._pair, self._end = (placed[0], placed[1]), length
        return placed[0][:, :, :length], placed[1][:, :, :length]


class RoomyLayer(DynamicLayer):
    """A dynamic layer whose keys and values are views into larger buffers.

    Args:
        room: tokens per row, prompt and completion, that need no further copy.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers = _Buffers(room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new states; return all of them, (batch, heads, length, dim)."""
        held = _states_of(self, key_states, value_states)
        self.keys, self.values = self._buffers.append(held, (key_states, value_states))
        self._buffers.keep(self.keys)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order; a row can be repeated. One copy, into buffers with room."""
        _reorder(self, self._buffers, beam_idx)


class RoomySlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer whose window is a view that moves through larger buffers.

    Args:
        sliding_window: tokens that a token attends to, itself included.
        room: tokens per row, prompt and completion, that are to come.
    """

    def __init__(self, sliding_window: int, room: int = 0) -> None:
        super().__init__(sliding_window=sliding_window)
        self._buffers = _Buffers(min(room or 2 * sliding_window, 2 * sliding_window))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new states; return those that a query of them may attend to, (batch, heads, length, dim)."""
        if self.record_past:
            return super().update(key_states, value_states, *args, **kwargs)
        held = _states_of(self, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys, values = self._buffers.append(held, (key_states, value_states))
        self.keys = keys[:, :, -self.sliding_window + 1 :]
        self.values = values[:, :, -self.sliding_window + 1 :]
        self._buffers.keep(self.keys)
        return keys, values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order; a row can be repeated. One copy, into buffers with room."""
        _reorder(self, self._buffers, beam_idx)


def _states_of(layer: DynamicLayer, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and values of a layer so far; of none, tensors of length 0 like the new ones."""
    if not layer.is_initialized:
        layer.lazy_initialization(key_states, value_states)
    assert layer.keys is not None
    assert layer.values is not None
    if layer.keys.dim() == key_states.dim():
        return layer.keys, layer.values
    return key_states[:, :, :0], value_states[:, :, :0]


def _reorder(layer: RoomyLayer | RoomySlidingLayer, buffers: _Buffers, rows: Tensor) -> None:
    if layer.keys is None or layer.values is None or not layer.keys.numel():
        return
    held = layer.keys, layer.values
    layer.keys, layer.values = buffers.place(held, held[0].shape[-2] + 1, rows.to(held[0].device))
    buffers.keep(layer.keys)
