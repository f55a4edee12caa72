"""Rows whose completions have several segments: each segment is read as a separate row.

An agent may begin its context anew: a template or a compaction rewrites what stood before. The completion of such an episode
holds its segments one after another, each later one with its own prompt outside the mask (`segments_NT` numbers them). The
model reads a segment without those before it, from position 0. So a loss sees one row per episode, and every log-probability
is that of the context in which the token was sampled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.models.inputs.arrange import Inputs

__all__ = ["split_segments"]


def split_segments(inputs: Inputs, batch: Batch) -> Inputs:
    """Return `inputs` with a row for each segment; itself where every completion has one.

    A later segment's first token has no state before it and gets that of the token before in the completion. It belongs to the
    segment's prompt, outside the mask.
    """
    segments_NT = batch.extras.get("segments_NT")
    if segments_NT is None or not segments_NT.any():
        return inputs
    rows = [
        _sizes(segments_NT[n, :length], prompt)
        for n, (length, prompt) in enumerate(
            zip(batch.lengths_N.tolist(), batch.prompt_lengths_N.tolist(), strict=True)
        )
    ]
    sizes = [size for row in rows for size in row]
    S, width = inputs.ids_NS.shape[1], max(sizes)
    ids_RS = inputs.ids_NS.new_zeros(len(sizes), width)
    place = torch.zeros(inputs.ids_NS.numel(), dtype=torch.long, device=ids_RS.device)
    flat, r = inputs.ids_NS.flatten(), 0
    for n, row in enumerate(rows):
        start = n * S
        for size in row:
            ids_RS[r, :size] = flat[start : start + size]
            place[start : start + size] = torch.arange(size, device=ids_RS.device) + r * width
            start, r = start + size, r + 1
    ends_R = torch.arange(len(sizes)) * width + torch.tensor(sizes) - 1
    return replace(
        inputs,
        ids_NS=ids_RS,
        states_M=place[inputs.states_M],
        last_N=place[inputs.last_N],
        ends_R=ends_R.to(ids_RS.device),
    )


def _sizes(segments_T: Tensor, prompt: int) -> list[int]:
    """Return the tokens of each segment of a row; the first one has the row's prompt."""
    first, *rest = torch.bincount(segments_T, minlength=1).tolist()
    return [prompt + first, *rest]
