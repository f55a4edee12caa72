"""Attention inside packed rows: one kernel for rows of any lengths on a GPU, one call per run of rows elsewhere.

On CUDA in bfloat16 or float16 this is torch's own variable-length flash attention (`torch.nn.attention.varlen`): it needs no
further package, takes grouped queries and sliding windows, and syncs nothing. On the CPU, and wherever the kernel cannot
compute a layer, rows of one length that follow one another are one call of `sdpa`. Both give what padded rows give.

The choice is made per call, from the tensors, so that no combination is computed wrongly. `varlen_obstacle` states
beforehand whether the kernel will be taken, since rows are padded on a GPU where it will not.

Left out on purpose: caps on attention logits and attention sinks, which `sdpa` lacks too (`models.loading.architecture`).

Shape letters: S tokens of all rows, D numbers per head.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PretrainedConfig

__all__ = [
    "NAME",
    "packed_attention",
    "register",
    "rows_attention",
    "uses_flash",
    "varlen_attention",
    "varlen_obstacle",
]

NAME = "rlhf_rows"
"""`packed_attention`, among transformers' implementations."""

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of the kernel."""

MOST_DIM = 256
"""Numbers per head that flash attention takes at most."""


def register(function: Callable[..., Any] | None = None) -> None:
    """Add `packed_attention`, or what stands for it, to transformers' implementations.

    Packed rows need no mask, others that of `sdpa`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, function or packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def uses_flash(config: PretrainedConfig) -> bool:
    """Return True if a text config's attention is flash attention: flash_attention_2, 3 or 4, or such a kernel of the hub.

    These are the names for which transformers calls its variable-length function, which keeps packed rows apart.
    """
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation) is flash_attention_forward


def varlen_obstacle(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return why packed rows cannot go through torch's kernel on a device, as half a sentence; empty if they can.

    Args:
        config: the model's text config.
        dtype: what the forward pass computes in.
    """
    if device.type != "cuda":
        return f"it needs CUDA, but this device is {device.type}"
    if dtype not in HALF:
        name = str(dtype).removeprefix("torch.")
        return f"it needs bfloat16 or float16, but this role uses {name}"
    if _kernel() is None:
        return f"torch {torch.__version__} lacks it (2.11 and later have it)"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is switched off in torch"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, which {torch.cuda.get_device_name(device)} lacks"
    heads = getattr(config, "num_attention_heads", None) or 1
    widest = getattr(config, "head_dim", None) or config.hidden_size // heads
    if widest > MOST_DIM:
        return f"it supports heads of at most {MOST_DIM} numbers, but the model's have {widest}"
    return ""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    attend: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa` does, (batch, heads, length, D) to (batch, length, heads, D); packed rows separately.

    Args:
        cu_seq_lens_q: int32 (rows + 1), where each row begins, and the end; None where rows are not packed.
        attend: what attends in the place of this, where ranks hold a shard of the tokens each (`SequenceShards`).
    """
    if attend is not None:
        return attend(module, query, key, value, cu_seq_lens_q=cu_seq_lens_q, **kwargs), None
    if cu_seq_lens_q is not None and _takes_kernel(query, value):
        return varlen_attention(module, query, key, value, cu_seq_lens_q, **kwargs)
    return rows_attention(module, query, key, value, attention_mask, cu_seq_lens_q, **kwargs)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend in packed rows, (1, heads, S, D) to (1, S, heads, D), by torch's variable-length kernel.

    Heads of other widths than multiples of 8, or of values narrower than keys, are filled with zeros, which change no product.

    Args:
        bounds: int32 (rows + 1), where each row begins, and the end.
        max_length_q: tokens of the longest row, or more.
        sliding_window: tokens that a token attends to, itself included; None is all before it.
    """
    call = _kernel()
    assert call is not None, "the caller asks `varlen_obstacle` first"
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    width, value_width = query.shape[-1], value.shape[-1]
    wide = max(width, value_width) + -max(width, value_width) % 8
    dtype = _half(value)
    queries, keys, values = (
        torch.nn.functional.pad(each[0].transpose(0, 1).to(dtype), (0, wide - each.shape[-1]))
        for each in (query, key, value)
    )
    output = call(
        queries,
        keys,
        values,
        bounds,
        bounds,
        max_length_q,
        max_length_q,
        scale=width**-0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0 if causal else -1),
        **({"enable_gqa": True} if queries.shape[1] != keys.shape[1] and _names_groups(call) else {}),
    )
    return output[None, ..., :value_width], None


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
    """Attend as transformers' `sdpa` does, (batch, heads, length, D) to (batch, length, heads, D); packed rows separately.

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


# ----------------------------------------------------------------------------------------------------------------------


@cache
def _kernel() -> Callable[..., Any] | None:
    """torch's variable-length attention with windows and a scale; None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


@cache
def _names_groups(call: Callable[..., Any]) -> bool:
    """Return True if the kernel needs a flag for grouped queries: from torch 2.13 on; before, it detects them."""
    return "enable_gqa" in inspect.signature(call).parameters


def _takes_kernel(query: Tensor, value: Tensor) -> bool:
    """Return True if the kernel can compute attention of these tensors."""
    return (
        query.device.type == "cuda"
        and _half(value) in HALF
        and max(query.shape[-1], value.shape[-1]) <= MOST_DIM
        and _kernel() is not None
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _half(states: Tensor) -> torch.dtype:
    """The dtype that attention computes in: under autocast its own, whatever a layer hands over."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def _window(length: int, width: int, like: Tensor) -> Tensor:
    """Causal attention to the last `width` tokens, itself among them: (1, 1, length, length) bool."""
    at = torch.arange(length, device=like.device)
    back = at[:, None] - at[None]
    return ((back >= 0) & (back < width))[None, None]
