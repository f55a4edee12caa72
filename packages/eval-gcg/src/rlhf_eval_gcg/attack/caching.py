"""Keys and values of a prompt's beginning, shared by all candidates of a batch.

transformers asks a cache's layers for the keys and values that a query attends to. The layers here hold those of one
beginning, give every row of a batch a view of them, and keep nothing of what rows add. A copy exists for one layer at a time,
inside the attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Beginning", "cache_window", "noting_cache", "shared_cache"]


@dataclass(frozen=True)
class Beginning:
    """Keys and values (1, heads, P, size) of each layer for the first P tokens of a prompt."""

    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    """keys and values of each layer; none for an empty beginning"""

    def __len__(self) -> int:
        return int(self.layers[0][0].shape[2]) if self.layers else 0

    def first(self, length: int) -> Beginning:
        """Return the part for the first `length` tokens, a view."""
        if not length:
            return Beginning()
        return Beginning(tuple((k[:, :, :length], v[:, :, :length]) for k, v in self.layers))

    def extend(self, fresh: Sequence[tuple[Tensor, Tensor]]) -> Beginning:
        """Return the beginning with the keys and values of further tokens."""
        if not self.layers:
            return Beginning(tuple(fresh))
        pairs = zip(self.layers, fresh, strict=True)
        return Beginning(tuple((torch.cat([k, n], 2), torch.cat([v, m], 2)) for (k, v), (n, m) in pairs))


@cache
def _layer_class() -> type[Any]:
    """Return the layer class; made late, since its base needs transformers."""
    from transformers.cache_utils import DynamicLayer

    class SharedLayer(DynamicLayer):
        """Holds keys and values of beginnings, one per group of rows, and forgets what a call adds.

        Args:
            parts: (keys, values) and number of rows of each group, in the order of the batch; of one length each.
            record: keep what the call adds in `fresh`.
        """

        def __init__(self, parts: list[tuple[tuple[Tensor, Tensor] | None, int]], record: bool) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.parts, self.record = parts, record
            self.fresh: tuple[Tensor, Tensor] | None = None
            self.length = max(0 if pair is None else int(pair[0].shape[2]) for pair, _ in parts)
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.record:
                self.fresh = (key_states.detach(), value_states.detach())
            if not self.length:
                return key_states, value_states
            return self._joined(0, key_states), self._joined(1, value_states)

        def _joined(self, which: int, fresh: Tensor) -> Tensor:
            """Return what all rows attend to: their beginnings, zeros before shorter ones, and what the call adds."""
            past = []
            for pair, rows in self.parts:
                one = fresh.new_zeros(1, fresh.shape[1], 0, fresh.shape[3]) if pair is None else pair[which]
                one = torch.nn.functional.pad(one, (0, 0, self.length - one.shape[2], 0))
                past.append(one.expand(rows, -1, -1, -1))
            return torch.cat([past[0] if len(past) == 1 else torch.cat(past), fresh], 2)

        def get_seq_length(self) -> int:
            return self.length

    return SharedLayer


@cache
def _noting_class() -> type[Any]:
    """Return the class of `noting_cache`'s layers."""
    from transformers.cache_utils import DynamicLayer

    class NotingLayer(DynamicLayer):
        """Passes keys and values on as they are."""

        def __init__(self, note: Callable[[int, Tensor], None], layer: int) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.note, self.layer = note, layer
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.note(self.layer, key_states)
            return key_states, value_states

        def get_seq_length(self) -> int:
            return 0

    return NotingLayer


def shared_cache(groups: Sequence[tuple[Beginning, int]], layers: int, record: bool) -> Any:
    """Return a cache of transformers over groups of rows.

    Args:
        groups: the beginning and the number of rows of each group, in the order of the batch.
        layers: number of the model's layers.
        record: let each layer keep what a call adds, as `fresh`.
    """
    from transformers.cache_utils import Cache

    def parts(layer: int) -> list[tuple[tuple[Tensor, Tensor] | None, int]]:
        return [(each.layers[layer] if each.layers else None, rows) for each, rows in groups]

    return Cache(layers=[_layer_class()(parts(layer), record) for layer in range(layers)])


def noting_cache(note: Callable[[int, Tensor], None], layers: int) -> Any:
    """Return a cache of transformers that holds nothing, and calls `note` with each layer's number and its keys."""
    from transformers.cache_utils import Cache

    return Cache(layers=[_noting_class()(note, layer) for layer in range(layers)])


def cache_window(model: Any) -> tuple[int, float]:
    """Return (number of layers, longest text) for which shared keys and values serve a model; (0, 0) if they never do.

    Recurrent layers have states that cannot be cut at a token. Sliding windows are no hindrance to shorter texts.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception:  # a config without what the cache asks for is one of an unusual architecture
        return 0, 0.0
    if not layers or any(type(each) not in (DynamicLayer, DynamicSlidingWindowLayer) for each in layers):
        return 0, 0.0
    windows = [float(each.sliding_window) for each in layers if isinstance(each, DynamicSlidingWindowLayer)]
    return len(layers), min(windows, default=float("inf"))
