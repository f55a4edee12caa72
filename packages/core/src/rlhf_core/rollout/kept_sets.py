"""Kept sets as a sampler finds them: a few tokens of many rows at a time, put together completion by completion at the end.

Shape letters: R live rows, B all rows of a wave, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_core.contract.kept_sets import BITS, WHOLE, KeptSets, Truncation, replays
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch
from rlhf_core.models.loading.limits import end_of_vocabulary, lacking_ids

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.providers import Rollout

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


def with_kept_sets(rollouts: Rollouts, sampling: Sampling, engine: Rollout, tokenizer: Any) -> Rollouts:
    """Return completions with the engine's kept sets, or where it gave none with the rules by which the trainer finds them.

    Args:
        rollouts: N completions.
        sampling: what they were sampled with; without replay they get no sets, whatever the engine gave.
        engine: the provider that sampled; it defines the order of truncation.
        tokenizer: of the role that was sampled; ids that it lacks are in no set.

    Raises:
        ContractError: the engine gave sets for other completions or tokens.
    """
    if not replays(sampling):
        return replace(rollouts, kept_sets=[])
    if rollouts.kept_sets:
        _check(rollouts, engine)
        return rollouts
    tokens = end_of_vocabulary(tokenizer)
    rule = Truncation(
        sampling.top_p, sampling.top_k, sampling.min_p, engine.min_p_first, tokens, lacking_ids(tokenizer, tokens)
    )
    return replace(rollouts, kept_sets=[rule for _ in range(len(rollouts))])


def _check(rollouts: Rollouts, engine: Rollout) -> None:
    """Check that there is a set for each token of each completion."""
    sizes = [
        length if isinstance(each, Truncation) else len(each)
        for each, length in zip(rollouts.kept_sets, rollouts.lengths_N.tolist(), strict=False)
    ]
    if len(rollouts.kept_sets) != len(rollouts) or sizes != rollouts.lengths_N.tolist():
        raise ContractError(
            f"rollout {type(engine).__name__} returned kept sets of {sum(sizes)} tokens in {len(rollouts.kept_sets)} "
            f"completions, for {int(rollouts.lengths_N.sum())} tokens in {len(rollouts)}: give one per completion"
        )
