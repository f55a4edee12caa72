"""Rows of any lengths in one long row without padding, and attention that reads a shared beginning once for all of them.

Everything that works token by token sees the tokens end to end. Attention multiplies the queries of a group by the keys of its
beginning as one matrix and attends within each row separately; the softmax is over both. Nothing is expanded or copied for each
row. `sdpa` would need both, and a mask.

The attention is registered as an implementation of transformers. A model must keep to that interface and to its cache. The
start of an attack compares losses with and without (`run`).

Shapes: B rows of N tokens after a beginning of P, S tokens of all rows, G key-value heads, R query heads for each, D numbers
of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_core.models.inputs.packed_attention import NAME as ROWS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PackedGroups", "can_attend"]

NAME = "rlhf_shared_beginnings"
"""`PackedGroups.attend`, among transformers' implementations."""

SCORE_CELLS = 1 << 17
"""Attention weights that are computed at a time: 512 KiB in float32, which stay in a core's cache."""


def can_attend(model: Any) -> bool:
    """Return True if the attention of a model can be replaced: it is `sdpa`, chosen through transformers' interface."""
    text = model.config.get_text_config(decoder=True)
    return bool(model._supports_attention_backend) and text._attn_implementation in ("sdpa", ROWS)


class PackedGroups:
    """Groups of rows, end to end.

    Args:
        sizes: (B, N) of each group.
        beginnings: keys and values (1, G, P, D) of each group's beginning, by layer; None for an empty one.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], beginnings: Sequence[Sequence[tuple[Tensor, Tensor]] | None]
    ) -> None:
        self.sizes, self.beginnings = sizes, beginnings
        self.layer = 0
        self.keys: Tensor | None = None

    def note(self, layer: int, keys: Tensor) -> None:
        """Note which layer gave its cache which keys; its attention comes next."""
        self.layer, self.keys = layer, keys

    @contextmanager
    def install(self, config: Any) -> Iterator[None]:
        """Inside, a model of this text config attends with `attend`."""
        from transformers import AttentionInterface

        before = config._attn_implementation
        AttentionInterface.register(NAME, self.attend)  # without a mask of that name, none is made
        config._attn_implementation = NAME
        try:
            yield
        finally:
            config._attn_implementation = before
            AttentionInterface.register(NAME, _attend_outside)  # the table lives as long as the process

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' `sdpa` does, (1, heads, S, D) to (1, S, heads, D); groups and rows separately.

        Raises:
            NotImplementedError: the layer's attention needs more than the keys and values that it gave its cache.
        """
        if key is not self.keys or attention_mask is not None or kwargs.get("position_bias") is not None:
            raise NotImplementedError(f"attention of {type(module).__name__} cannot share beginnings")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        half = query.dtype in (torch.bfloat16, torch.float16)
        q, k, v = (each[0].float() if half else each[0] for each in (query, key, value))
        q = (q * scale).unflatten(0, (k.shape[0], -1))  # (G, R, S, D)
        outputs = []
        begin = 0
        for (rows, new), beginning in zip(self.sizes, self.beginnings, strict=True):
            past = None if beginning is None else [each[0].to(q.dtype) for each in beginning[self.layer]]
            cells = q.shape[0] * q.shape[1] * new * (new + (0 if past is None else past[0].shape[1]))
            for some in _parts(rows, max(1, SCORE_CELLS // cells)):
                own = slice(begin, begin + some * new)
                own_k, own_v = (each[:, own].unflatten(1, (some, new)) for each in (k, v))
                outputs.append(_attend_rows(q[:, :, own].unflatten(2, (some, new)), own_k, own_v, past))
                begin += some * new
        return torch.cat(outputs)[None].to(query.dtype), None


def _attend_outside(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Stand in for `PackedGroups.attend` between passes, so that no pass is kept in memory."""
    raise NotImplementedError(f"{type(module).__name__} attends to packed rows outside of `PackedGroups.install`")


def _parts(total: int, most: int) -> list[int]:
    """Cut a number into equal parts of at most `most`."""
    count = -(-total // most)
    ends = [total * k // count for k in range(count + 1)]
    return [after - before for before, after in pairwise(ends)]


def _attend_rows(q_GRBND: Tensor, k_GBND: Tensor, v_GBND: Tensor, past: Sequence[Tensor] | None) -> Tensor:
    """Return the output (B N, G R, D) of scaled queries that attend to one beginning and to their own row up to them."""
    heads, shared, rows, new, _ = q_GRBND.shape
    q = q_GRBND.transpose(1, 2).reshape(heads, rows * shared * new, -1)
    k, v = k_GBND.flatten(0, 1), v_GBND.flatten(0, 1)
    later_NN = torch.ones(new, new, dtype=torch.bool, device=q.device).triu(1)
    own = q.reshape(heads * rows, shared * new, -1) @ k.transpose(1, 2)
    own.view(-1, new, new).masked_fill_(later_NN, -torch.inf)
    if past is None:
        output = own.softmax(-1) @ v
    else:
        k_GPD, v_GPD = past
        weights = torch.cat([q @ k_GPD.transpose(1, 2), own.view(heads, -1, new)], 2).softmax(-1)
        of_past, of_own = weights.split([k_GPD.shape[1], new], 2)
        output = (of_own.reshape(heads * rows, shared * new, new) @ v).view(heads, q.shape[1], -1)
        output += of_past @ v_GPD
    return output.view(heads, rows, shared, new, -1).permute(1, 3, 0, 2, 4).reshape(rows * new, heads * shared, -1)
