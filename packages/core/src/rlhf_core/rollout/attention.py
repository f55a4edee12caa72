"""Attention of one new token, without repeating keys and values for grouped queries.

While decoding, every query head attends from the same position, so the heads that share a key-value head can take the
place where a sequence has its positions: (batch, heads, 1, dim) becomes (batch, kv heads, heads per kv head, dim), and the
mask broadcasts. The result is the same; transformers' path copies all keys and values once per group of heads instead.
Registered in addition to transformers' own implementations; models that are not on `sdpa`, or choose by its name, keep
what they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = ["decode_attention", "shared_heads"]

NAME = "rlhf_decode"


@contextmanager
def shared_heads(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that uses `sdpa` attends with `decode_attention`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from rlhf_core.models.inputs.packed_attention import NAME as ROWS

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before not in ("sdpa", ROWS) or not model._supports_attention_backend:
        yield
        return
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `sdpa`: (batch, heads, length, dim) to (batch, length, heads, dim); one token takes a short path."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, length, _ = query.shape
    per_kv_head = heads // key.shape[1]
    same_for_heads = attention_mask is None or attention_mask.shape[1] == 1
    if length > 1 or per_kv_head == 1 or not same_for_heads or kwargs.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    grouped = query.reshape(batch, key.shape[1], per_kv_head, -1)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1), None
