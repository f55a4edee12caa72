"""Group completions into one buffer of keys and values, with a segment of cells for each."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.rollout.sampler import Piece
from rlhf_core.rollout.step import BUCKETS

__all__ = ["plan_chunks", "plan_segments"]


def plan_segments(
    lengths: Sequence[int], limits: Sequence[int], n: int, cells: int, rows: int = BUCKETS[-1]
) -> list[list[Piece]]:
    """Group completions to sample together: as many as fit into the cells and rows, those of long prompts first.

    Args:
        lengths, limits: P prompts' tokens, and the most new ones of each completion of them.
        n: completions per prompt.
        cells: tokens that fit; a completion that needs more is a separate wave.
    """
    waves: list[list[Piece]] = []
    left = many = 0
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size, k = lengths[prompt] + limits[prompt], 0
        while k < n:
            fits = min(n - k, left // size, many)
            if fits < 1:
                waves.append([])
                left, many = max(cells, size), rows
                continue
            waves[-1].append(Piece(prompt, k, k + fits))
            left, many, k = left - fits * size, many - fits, k + fits
    return waves


def plan_chunks(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Cut numbers 0, 1, 2 and so on into runs whose sizes add up to `budget` at most, or are one that is larger."""
    chunks: list[list[int]] = []
    left = 0
    for number, size in enumerate(sizes):
        if not chunks or size > left:
            chunks.append([])
            left = budget
        chunks[-1].append(number)
        left -= size
    return chunks
