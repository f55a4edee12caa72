"""Kept sets as a sampler finds them: a few tokens of many rows at a time, put together completion by completion at the end.

Shape letters: R live rows, B all rows of a wave, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf_core.contract.kept_sets import BITS, WHOLE, KeptSets, Truncation, replays
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.options import Sampling

__all__ = ["KeptSetsRecorder", "with_kept_sets"]

LIST_BITS = 32
"""Bits of an entry of a list: from V / 32 tokens on, V bits are the smaller form."""


class KeptSetsRecorder:
    """Collects the kept sets of a wave.

    Args:
        rows: B.
        tokens: T, at most so many per row.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self.counts_BT = torch.full((rows, tokens), WHOLE, dtype=torch.int32)
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._wide_rows: list[Tensor] = []
        self._bits: list[Tensor] = []

    def add(self, row_R: Tensor, t: int, kept_RV: Tensor) -> None:
        """Take the sets of token `t` of the rows `row_R`, of which `kept_RV` is true."""
        V = kept_RV.shape[1]
        count_R = kept_RV.sum(1)
        narrow_R, wide_R = count_R * LIST_BITS <= V, (count_R * LIST_BITS > V) & (count_R < V)
        place, ids = kept_RV[narrow_R].nonzero(as_tuple=True)
        self._rows.append(row_R[narrow_R][place].cpu())
        self._ids.append(ids.int().cpu())
        code_R = torch.where(narrow_R, count_R, torch.where(wide_R, BITS, WHOLE))
        self.counts_BT[row_R.cpu(), t] = code_R.int().cpu()
        if bool(wide_R.any()):
            self._wide_rows.append(row_R[wide_R].cpu())
            self._bits.append(torch.from_numpy(np.packbits(kept_RV[wide_R].cpu().numpy(), axis=1)))

    def completions(self, lengths: Sequence[int]) -> list[KeptSets]:
        """Return the sets of each row, of its first tokens. Nothing was added after them."""
        B = len(self.counts_BT)
        ids = _by_row(self._rows, self._ids, B)
        bits = _by_row(self._wide_rows, self._bits, B)
        return [KeptSets(self.counts_BT[row, :length], ids[row], bits[row]) for row, length in enumerate(lengths)]


def _by_row(rows: list[Tensor], values: list[Tensor], count: int) -> list[Tensor]:
    """Return the values of each of `count` rows, in the order in which they came."""
    if not values:
        return [torch.zeros(0, 0, dtype=torch.uint8)] * count
    row_E, value_E = torch.cat(rows), torch.cat(values)
    order = row_E.argsort(stable=True)
    parts = value_E[order].split(torch.bincount(row_E, minlength=count).tolist())
    return [part.clone() for part in parts]  # a row that is picked must not hold the others' memory


def with_kept_sets(rollouts: Rollouts, sampling: Sampling) -> Rollouts:
    """Return completions with the engine's kept sets, or where it gave none with the rules by which the trainer finds them."""
    if rollouts.kept_sets or not replays(sampling):
        return rollouts
    rules: list[KeptSets | Truncation] = [Truncation(sampling.top_p, sampling.top_k, sampling.min_p)]
    return replace(rollouts, kept_sets=rules * len(rollouts))
