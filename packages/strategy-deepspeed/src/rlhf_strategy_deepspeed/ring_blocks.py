"""Blocks of ring attention: which tokens attend to which, attention inside a block, its gradients, and how blocks are merged.

Packed tokens are cut into pieces of one width. Only one row can reach from a piece into a later one, so between two pieces
every query of a rectangle attends to every key of it, without a mask. Inside a piece each row is causal. A query's output
over several blocks is their mean, weighted by the sums of their exponentials (`merge`).

The mathematics is float32 or wider. On CUDA in bfloat16 or float16 a block is torch's own flash attention, which returns the
logarithm of the sum. Elsewhere scores exist for a tile of queries at a time. Grouped queries never repeat their keys.

Shape letters: h query heads, g key heads, r = h / g, t tokens of a rank, m queries, n keys, D numbers per head.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Block", "add_gradients", "attend", "merge", "plan_blocks"]

SCORES = 2**22
"""Most scores of all heads that a tile holds at once: 16 MiB in float32."""

FLASH_DIM = 256
"""Most numbers per head of flash attention."""


@dataclass(frozen=True)
class Block:
    """Queries and keys of a rank that attend."""

    queries: slice
    keys: slice
    rows: tuple[int, ...] = ()
    """tokens of each row of both, causal in each; empty where every query attends to every key"""


def plan_blocks(bounds: Sequence[int], width: int, queries: Sequence[int], keys: Sequence[int]) -> list[Block]:
    """Return the blocks between the pieces of two ranks, in a number that grows with pieces and not with rows.

    Args:
        bounds: (rows + 1), where each row begins, and the end.
        width: tokens of a piece.
        queries: numbers of the pieces that the rank holds whose queries these are, in its order.
        keys: those of the rank whose keys these are.
    """
    found = []
    for place, piece in enumerate(queries):
        start, end = piece * width, (piece + 1) * width
        for other_place, other in enumerate(keys):
            if other == piece and width:
                inside = [bound for bound in bounds if start < bound < end]
                edges = [start, *sorted(set(inside)), end]
                rows = tuple(after - before for before, after in pairwise(edges))
                found.append(Block(_span(place, width, 0, width), _span(other_place, width, 0, width), rows))
            if other < piece:
                row = bisect_right(bounds, start) - 1  # the one that may have begun in an earlier piece
                first, last = max(bounds[row] - other * width, 0), min(bounds[row + 1] - start, width)
                if first < width:
                    found.append(Block(_span(place, width, 0, last), _span(other_place, width, first, width)))
    return found


def attend(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention of a block's queries to its keys (h, m, D) and the logarithm of the sum of exponentials (h, m).

    Args:
        query: (h, t, D).
        key: (g, t, D).
        value: (g, t, D of values).
        block: which of them attend.
        scale: factor of products.
    """
    if _takes_flash(query, value):
        return _flash(query, key, value, block, scale)
    grouped, keys, values = _block_parts(query, key, value, block)
    outputs, sums = [], []
    for at, seen, first in _tiles(block, len(query)):
        scores = _scores(grouped[:, :, at], keys[:, seen], scale, first)  # (g, r, m, n)
        total = scores.logsumexp(-1)
        weights = scores.sub_(total[..., None]).exp_()
        outputs.append(_of_groups(weights.flatten(1, 2) @ values[:, seen], grouped))
        sums.append(total)
    return torch.cat(outputs, 2).flatten(0, 1), torch.cat(sums, 2).flatten(0, 1)


def merge(output: Tensor, total: Tensor, block: Block, found: tuple[Tensor, Tensor]) -> None:
    """Add a block to what its queries got from others, in place.

    Args:
        output: (h, t, D), float32 or wider, zero before the first block.
        total: (h, t), logarithm of the sum of exponentials, -inf before the first block.
        block: the block.
        found: what `attend` returned for it.
    """
    block_output, block_total = found
    before = total[:, block.queries]
    both = torch.logaddexp(before, block_total.to(total.dtype))
    kept, new = (before - both).exp()[..., None], (block_total - both).exp()[..., None]
    output[:, block.queries] = output[:, block.queries] * kept + block_output * new
    total[:, block.queries] = both


def add_gradients(
    into: tuple[Tensor, Tensor, Tensor],
    parts: tuple[Tensor, Tensor, Tensor],
    given: tuple[Tensor, Tensor, Tensor],
    block: Block,
    scale: float,
) -> None:
    """Add a block's gradients in place; its weights are computed again, with the sum over all blocks.

    Args:
        into: gradients of queries, keys and values, float32 or wider.
        parts: query, key and value, as in `attend`.
        given: the output over all blocks (h, t, D), its gradient, and the logarithm of the sum of exponentials (h, t).
        block: the block.
        scale: factor of products.
    """
    query, key, value = parts
    output, gradient, total = (each[:, block.queries] for each in given)
    if _takes_flash(query, value):
        found = _flash_gradients(parts, (output, gradient, total), block, scale)
        for whole, where, part in zip(into, (block.queries, block.keys, block.keys), found, strict=True):
            whole[:, where] += part
        return
    grouped, keys, values = _block_parts(query, key, value, block)
    wide = grouped.dtype
    shape = len(key), -1
    gradient, total = gradient.to(wide).unflatten(0, shape), total.to(wide).unflatten(0, shape)
    mean = (gradient * output.to(wide).unflatten(0, shape)).sum(-1)  # (g, r, m)
    to_query = into[0][:, block.queries].unflatten(0, shape)
    to_key, to_value = into[1][:, block.keys], into[2][:, block.keys]
    for at, seen, first in _tiles(block, len(query)):
        scores = _scores(grouped[:, :, at], keys[:, seen], scale, first)
        weights = scores.sub_(total[:, :, at, None]).exp_()  # (g, r, m, n)
        flat = gradient[:, :, at].flatten(1, 2)  # (g, r m, D)
        to_value[:, seen] += weights.flatten(1, 2).transpose(1, 2) @ flat
        slope = _of_groups(flat @ values[:, seen].transpose(1, 2), weights).sub_(mean[:, :, at, None])
        slope = slope.mul_(weights).mul_(scale).flatten(1, 2)
        to_query[:, :, at] += _of_groups(slope @ keys[:, seen], grouped)
        to_key[:, seen] += slope.transpose(1, 2) @ grouped[:, :, at].flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------------------


def _span(place: int, width: int, first: int, last: int) -> slice:
    """Return a part of the piece that a rank holds at `place`."""
    return slice(place * width + first, place * width + last)


def _block_parts(query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's queries (g, r, m, D), keys and values (g, n, D), in float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query[:, block.queries].to(wide).unflatten(0, (len(key), -1))
    return grouped, key[:, block.keys].to(wide), value[:, block.keys].to(wide)


def _of_groups(flat: Tensor, like: Tensor) -> Tensor:
    """Return (g, r m, ...) as (g, r, m, ...)."""
    grouped: Tensor = flat.unflatten(1, (like.shape[1], -1))
    return grouped


def _tiles(block: Block, heads: int) -> Iterator[tuple[slice, slice, int | None]]:
    """Yield queries and keys of a block in turn, counted in it, and which key the first query is; None without a mask."""
    if not block.rows:
        count, keys = block.queries.stop - block.queries.start, block.keys.stop - block.keys.start
        step = max(1, SCORES // (heads * keys))
        for first in range(0, count, step):
            yield slice(first, min(first + step, count)), slice(0, keys), None
    start = 0
    for length in block.rows:
        step = max(1, SCORES // (heads * length))
        for first in range(0, length, step):
            last = start + min(first + step, length)
            yield slice(start + first, last), slice(start, last), first
        start += length


def _scores(grouped: Tensor, keys: Tensor, scale: float, first: int | None) -> Tensor:
    """Return scaled products (g, r, m, n), -inf for keys after their query."""
    scores = _of_groups(grouped.flatten(1, 2) @ keys.transpose(1, 2), grouped).mul_(scale)
    if first is None:
        return scores
    m, n = scores.shape[-2:]
    after = torch.arange(n, device=keys.device) > torch.arange(first, first + m, device=keys.device)[:, None]
    return scores.masked_fill_(after, -torch.inf)


# ----------------------------------------------------------------------------------------------------------------------
# torch's flash attention (CUDA)
# ----------------------------------------------------------------------------------------------------------------------


def _takes_flash(query: Tensor, value: Tensor) -> bool:
    """Return True if torch's flash attention can compute blocks of these tensors."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and width == value.shape[-1]
        and width <= FLASH_DIM
        and width % 8 == 0
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    """Return what `attend` does."""
    found = torch.ops.aten._flash_attention_forward(*_flash_arguments(query, key, value, block), False, scale=scale)
    return found[0].transpose(0, 1), found[1]


def _flash_gradients(
    parts: tuple[Tensor, Tensor, Tensor], given: tuple[Tensor, Tensor, Tensor], block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of a block's queries, keys and values; `given` is of its queries."""
    query, key, value, *rest = _flash_arguments(*parts, block)
    output, gradient = (each.transpose(0, 1).to(query.dtype).contiguous() for each in given[:2])
    draws = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that there is not
    found = torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, given[2].contiguous(), *rest, draws, draws[:0], scale=scale
    )
    to_query, to_key, to_value = (each.transpose(0, 1) for each in found)
    return to_query, to_key, to_value


def _flash_arguments(
    query: Tensor, key: Tensor, value: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool]:
    """Return a block's tensors (tokens, heads, D), the bounds and longest of its rows on both sides, dropout, and causality."""
    tensors = (query[:, block.queries], key[:, block.keys], value[:, block.keys])
    queries, keys, values = (each.transpose(0, 1).contiguous() for each in tensors)
    sides = [block.rows or (len(each),) for each in (queries, keys)]
    bounds = [torch.tensor((0, *side), device=query.device).cumsum(0, dtype=torch.int32) for side in sides]
    return queries, keys, values, bounds[0], bounds[1], max(sides[0]), max(sides[1]), 0.0, bool(block.rows)
