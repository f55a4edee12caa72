"""Keys and values in fixed buffers, one segment of cells per row, and attention of one new token per row to its segment.

Nothing moves: a row that ends is no longer named, and the others stay where they are. A decoding step reads `lengths` and
`starts` from tensors of the device, so that a CUDA graph of one step serves all steps. Rows have no padding, and attention
reads each row's own tokens only, by flash attention's lengths per row; without that kernel, such as on the CPU, rows are
gathered into a padded tensor and masked.

The model hands nothing over but the attention call itself (`slot_attention` among transformers' implementations), so that no
cache class of transformers takes part. Layers with another memory than keys and values cannot be sampled this way.

Shape letters: R rows of a step, C cells, S prompt tokens end to end, G query heads per key-value head, D numbers per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch  # noqa: TID253  an operator is registered at once; only a method that samples imports this module
from torch import Tensor  # noqa: TID253

from rlhf_core.models.inputs.packed_attention import packed_attention

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Slots", "attend_masked", "slot_attention", "slots_attended"]

NAME = "rlhf_slots"


@dataclass
class Slots:
    """The buffers of all layers, and where the tokens of the pass at hand go.

    Args:
        cells: C, tokens that fit into every layer.
        dtype: of keys and values.
        flash: attend by flash attention's kernel; else by `attend_masked`.
    """

    cells: int
    dtype: torch.dtype
    flash: bool = True
    layers: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """keys and values of each attention layer, (C, kv heads, D)"""
    cells_S: Tensor | None = None
    """while prompts are read, the cell of each of their tokens"""
    starts_R: Tensor | None = None
    """while a token is added to each row, int32 (R + 1), ascending: the first cell of each, and the end of the buffers"""
    cells_R: Tensor | None = None
    """int64, the cell of each row's new token"""
    lengths_R: Tensor | None = None
    """int32, tokens of each row, the new one included"""
    row_R: Tensor | None = None
    """int32 (R + 1): 0, 1, 2 and so on; the bounds of queries of one token each"""
    widest: int = 0
    """tokens of the longest row, or more"""

    def layer(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buffers of a layer, made when it is first met; `key` and `value` are (batch, kv heads, length, D)."""
        if module not in self.layers:
            keys, values = (
                torch.zeros(self.cells, each.shape[1], each.shape[3], dtype=self.dtype, device=each.device)
                for each in (key, value)
            )
            self.layers[module] = keys, values
            self.attach()
        return self.layers[module]

    def attach(self) -> None:
        """Let each attention layer know its buffers: a compiled block serves all layers, and may not look them up by layer."""
        for module, (keys, values) in self.layers.items():
            module.slot_keys, module.slot_values = keys, values

    def detach(self) -> None:
        """Take the buffers from the layers."""
        for module in self.layers:
            del module.slot_keys, module.slot_values

    @property
    def bytes_per_cell(self) -> int:
        """Bytes that a token takes in all layers."""
        return sum(buffer[0].nbytes for pair in self.layers.values() for buffer in pair)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy cells `source` to `target` in every layer."""
        for pair in self.layers.values():
            for buffer in pair:
                buffer.index_copy_(0, target, buffer.index_select(0, source))


@contextmanager
def slots_attended(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends with `slot_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    AttentionInterface.register(NAME, slot_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slots: Slots | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Keep the new keys and values and attend, (batch, heads, length, D) to (batch, length, heads, D).

    Args:
        slots: the buffers; prompts are end to end in a batch of one, later tokens are one per row.
    """
    rest = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
    if slots is None:
        return packed_attention(module, query, key, value, attention_mask, **rest)
    if slots.cells_S is not None:
        for buffer, new in zip(slots.layer(module, key, value), (key, value), strict=True):
            buffer.index_copy_(0, slots.cells_S, new[0].transpose(0, 1).to(slots.dtype))
        return packed_attention(module, query, key, value, attention_mask, **rest)
    assert slots.cells_R is not None
    keys, values = module.slot_keys, module.slot_values
    keys.index_copy_(0, slots.cells_R, key[:, :, 0].to(slots.dtype))
    values.index_copy_(0, slots.cells_R, value[:, :, 0].to(slots.dtype))
    queries = query[:, :, 0].to(slots.dtype).contiguous()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _attend_flash if slots.flash else attend_masked
    return attend(slots, queries, keys, values, scale, sliding_window)[:, None], None


def attend_masked(
    slots: Slots, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend by one `sdpa` over padded copies of all segments: (R, heads, D), for devices without the kernel, and its check."""
    assert slots.starts_R is not None
    assert slots.lengths_R is not None
    at = torch.arange(slots.widest, device=queries.device)
    cells_RW = (slots.starts_R[:-1, None] + at).clamp(max=slots.cells - 1)
    seen_RW = at < slots.lengths_R[:, None]
    if window is not None:
        seen_RW &= at >= slots.lengths_R[:, None] - window
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # (R, kv heads, G, D): heads of a group share keys
    key_rows, value_rows = (buffer[cells_RW].transpose(1, 2) for buffer in (keys, values))
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key_rows, value_rows, attn_mask=seen_RW[:, None, None], scale=scale
    )
    return output.flatten(1, 2)


def _attend_flash(
    slots: Slots, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attend by flash attention, which takes a first cell and a length per row: (R, heads, D)."""
    assert slots.starts_R is not None
    assert slots.lengths_R is not None
    assert slots.row_R is not None
    output: Tensor = torch.ops.rlhf.attend_slots(
        *(queries, keys, values, slots.row_R, slots.starts_R, slots.lengths_R, slots.widest, scale, window or 0)
    )
    return output


@torch.library.custom_op("rlhf::attend_slots", mutates_args=())
def _attend_slots(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    lengths: Tensor,
    widest: int,
    scale: float,
    window: int,
) -> Tensor:
    """Call flash attention: one operator to torch.compile, which need not know its insides. A window of 0 is none.

    torch's public function has lengths per row from 2.13 on only; the operator below it has had them since 2.5.
    """
    output, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        rows,
        starts,
        1,
        widest,
        0.0,  # no dropout
        False,  # the newest token sees all before it
        False,  # no mask of dropout
        scale=scale,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
        seqused_k=lengths,
    )
    states: Tensor = output
    return states.contiguous()


@_attend_slots.register_fake
def _(queries: Tensor, *_: Any) -> Tensor:
    return queries.new_empty(queries.shape)
