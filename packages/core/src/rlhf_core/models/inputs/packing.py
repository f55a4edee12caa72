"""Rows one after another in a single long row, so that no padding is computed: what packing is here.

A micro-batch's rows lie end to end, positions begin anew with each, and attention stays inside a row. Everything that works
token by token (embeddings, projections, norms, the feed-forward parts: nearly all of the work) then sees real tokens only.
Attention takes the rows' bounds: `flash_attention_2` as its variable-length kernel does, and `sdpa` on the CPU through the
function below, one call for each run of equally long rows, on views; no mask of (tokens, tokens) exists. Elsewhere rows are
padded to the longest of their micro-batch, which holds rows of like length.

Whether an architecture can do it is found out, not listed: it must support flash attention, which obliges it to tell its
attention function everything (sliding windows are an argument), and a forward pass over two packed rows must give what two
rows by themselves give. Recurrent layers and convolutions over time fail that and stay padded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from rlhf_core.models.inputs.arrange import Inputs

__all__ = ["NAME", "PackedRows", "can_pack", "pack_rows", "rows_attention"]

NAME = "rlhf_rows"
"""The attention function below, among transformers' implementations."""


@dataclass(frozen=True)
class PackedRows:
    """What the body of a model reads."""

    ids_1S: Tensor
    """int64 token ids of all rows, end to end"""
    positions_1S: Tensor
    """int64, from 0 in each row"""
    bounds: Tensor
    """int32 (rows + 1), where each row begins, and the end"""
    longest: int
    """tokens of the longest row"""

    def arguments(self, flash: bool) -> dict[str, Any]:
        """Keyword arguments of a body's forward pass, in transformers' own names."""
        # a mask of four dimensions is passed on as it is: none is made, and `rows_attention` needs none
        mask = None if flash else self.ids_1S.new_ones(1, 1, 1, 1, dtype=torch.bool)
        return {
            "input_ids": self.ids_1S,
            "position_ids": self.positions_1S,
            "attention_mask": mask,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def pack_rows(inputs: Inputs) -> tuple[PackedRows, Inputs]:
    """The rows without their padding, and `inputs` with its positions counted in them."""
    N, S = inputs.ids_NS.shape
    lengths_N = inputs.last_N - torch.arange(N, device=inputs.last_N.device) * S + 1
    real_NS = torch.arange(S, device=lengths_N.device) < lengths_N[:, None]
    place_NS = real_NS.flatten().cumsum(0) - 1
    rows = PackedRows(
        ids_1S=inputs.ids_NS[real_NS][None],
        positions_1S=torch.arange(S, device=lengths_N.device).expand(N, S)[real_NS][None],
        bounds=torch.nn.functional.pad(lengths_N.cumsum(0), (1, 0)).int(),
        longest=S,
    )
    return rows, replace(inputs, states_M=place_NS[inputs.states_M], last_N=place_NS[inputs.last_N])


def can_pack(model: Any) -> bool:
    """Whether the model's attention can keep rows apart; if it is `sdpa`, it becomes `rows_attention`.

    Tried out on two rows of three tokens.
    """
    text = model.config.get_text_config(decoder=True)
    flash = text._attn_implementation == "flash_attention_2"
    supported = model._supports_flash_attn and model._supports_attention_backend
    if flash or not supported or text._attn_implementation != "sdpa":
        return bool(flash and supported)
    _register()
    text._attn_implementation = NAME
    if not _isolates_rows(model):
        text._attn_implementation = "sdpa"
        return False
    return True


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, rows_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@torch.no_grad()
def _isolates_rows(model: Any) -> bool:
    """Whether two packed rows give the states of two rows."""
    body = model.base_model
    ids_NS = torch.tensor([[1, 2, 3], [4, 5, 6]], device=model.device)
    lengths = torch.tensor([0, 3, 6], dtype=torch.int32, device=model.device)
    rows = PackedRows(ids_NS.view(1, 6), torch.arange(3, device=model.device).repeat(2)[None], lengths, 3)
    try:
        together = body(use_cache=False, **rows.arguments(flash=False))[0].view(2, 3, -1)
        apart = body(input_ids=ids_NS, use_cache=False)[0]
    except Exception:  # code of any architecture: whatever it cannot do, it need not
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return together.shape == apart.shape and torch.allclose(together, apart, rtol=tolerance, atol=tolerance)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls `sdpa`, (batch, heads, length, dim) to (batch, length, heads, dim); packed rows each by itself.

    Rows of one length that follow one another are one call. `split` and not slices: the gradient of a slice is a tensor of
    the whole.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    runs = [(length, len(list(same))) for length, same in groupby(cu_seq_lens_q.diff().tolist())]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(runs, *(each.split(sizes, 2) for each in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for part in parts)
        mask = None if sliding_window is None or length <= sliding_window else _window(length, sliding_window, q)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, **kwargs)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _window(length: int, width: int, like: Tensor) -> Tensor:
    """Causal attention to the last `width` tokens, itself among them: (1, 1, length, length) bool."""
    at = torch.arange(length, device=like.device)
    back = at[:, None] - at[None]
    return ((back >= 0) & (back < width))[None, None]
