"""Cutting a batch into micro-batches by token budget, and into minibatches by group.

Rows are sorted by length first, so that a micro-batch holds rows of like length and little of it is padding. Where padding
is what costs time, further micro-batches keep it below a share. No cut changes a result (see `training.reduction`); the
budget only trades memory for speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.kept_sets import KeptSets
from rlhf_core.contract.requirements import rest_of, shape_of
from rlhf_core.contract.terms import PAIRS_ADVICE
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["Minibatches", "bearable_padding", "joint_rounds", "micro_batch", "micro_rows", "padding_share"]

CHEAP = 32
"""Cells of padding that cost less than one more micro-batch does, even of a small model."""


def bearable_padding(module: Any) -> float:
    """The share of a forward pass of `module` that may be padding before a further micro-batch is cheaper.

    On a CPU time is cells. An accelerator waits for launches as long as micro-batches are small, and where rows are packed
    nothing is padded: there, as few micro-batches as fit.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    return 0.05 if on_cpu and not module.packs else 1.0


def micro_rows(batch: Batch, tokens: int, rows_per_unit: int = 1, padding: float = 1.0) -> list[Tensor]:
    """Row numbers of each micro-batch: at most `tokens` cells, padding included, but always at least one unit.

    A unit is `rows_per_unit` adjacent rows (a chosen/rejected pair). Longest first, so that memory peaks at once. Of the
    cells at most the share `padding` (or a few cells in all) are units shorter than the first.
    """
    if not len(batch):
        return []
    if len(batch) % rows_per_unit:
        raise UsageError(
            f"the loss compares {rows_per_unit} completions of each prompt, but the data has prompts with another "
            f"number: {PAIRS_ADVICE}"
        )
    lengths_U = (batch.prompt_lengths_N + batch.lengths_N).view(-1, rows_per_unit).amax(1)
    order_U = torch.argsort(lengths_U, descending=True, stable=True)
    cuts: list[list[int]] = []
    widest = spare = 0
    for unit, length in zip(order_U.tolist(), lengths_U[order_U].tolist(), strict=True):
        cells = (len(cuts[-1]) + 1) * rows_per_unit * widest if cuts else 0
        spare += rows_per_unit * (widest - length)
        if not cuts or cells > tokens or spare > max(CHEAP, padding * cells):
            cuts.append([])
            widest, spare = length, 0
        cuts[-1].append(unit)
    rows_in_unit = torch.arange(rows_per_unit)
    return [(torch.tensor(units)[:, None] * rows_per_unit + rows_in_unit).flatten() for units in cuts]


def micro_batch(batch: Batch, cuts: list[Tensor], i: int, unit: int = 1, kept: bool = False) -> Batch:
    """The i-th micro-batch. Past the last, on a rank that has fewer than another, the last again, to be given no weight; on
    one that has none, a unit of one token each, without texts or labels, and with zero for every extra.

    With `kept`, that unit has kept sets, as the rows of other ranks do: ranks that gather weights must compute alike.
    """
    if cuts:
        return batch.rows(cuts[min(i, len(cuts) - 1)])
    one_N, token_NT = torch.ones(unit, dtype=torch.long), torch.zeros(unit, 1, dtype=torch.long)
    lists: dict[str, Any] = {name: [None] * unit for name in batch._per_row()}
    return replace(
        batch,
        **lists | {"prompts": [""] * unit, "texts": [""] * unit, "meta": [{}] * unit, "images": []},
        kept_sets=[KeptSets.whole(1)] * unit if kept else [],
        prompt_NL=token_NT,
        prompt_lengths_N=one_N,
        tokens_NT=token_NT,
        lengths_N=one_N,
        mask_NT=torch.ones(unit, 1, dtype=torch.bool),
        group_N=torch.zeros(unit, dtype=torch.long),
        extras={
            name: torch.zeros(shape_of(name, (unit, 1), rest_of(name, tensor)), dtype=tensor.dtype)
            for name, tensor in batch.extras.items()
        },
        scalars=dict(batch.scalars),
        step=batch.step,
    )


def joint_rounds(batch: Batch, cuts: list[Tensor], world: World) -> tuple[int, bool]:
    """Return how many forward passes every rank runs for this rank's micro-batches `cuts`, and if any rank has kept sets.

    Ranks step together, since weights may be sharded over them: one that has fewer repeats rows with no weight.
    """
    rounds, kept = zip(*world.gather((len(cuts), bool(batch.kept_sets))), strict=True)
    return max(rounds), any(kept)


def padding_share(batch: Batch, cuts: list[Tensor], packs: bool = False) -> float:
    """The share of a forward pass's cells that are padding, 0..1; where it packs, only rows with images are padded."""
    if packs and not any(batch.images):
        return 0.0
    lengths_N = batch.prompt_lengths_N + batch.lengths_N
    padded = [not packs or any(batch.images[row] for row in rows) for rows in cuts]
    cells = sum(
        int(lengths_N[rows].max()) * len(rows) if each else int(lengths_N[rows].sum())
        for rows, each in zip(cuts, padded, strict=True)
    )
    return 1 - float(lengths_N.sum()) / max(cells, 1)


class Minibatches:
    """Minibatches of a role in an iteration, by credit key: each credited batch in `parts` parts of whole groups, every epoch.

    The parts are cut from the groups of all ranks of `world` together, so how many ranks there are changes no part; a rank
    may hold none of one. Groups are identified by their prompts' numbers (`uids_N`) where the batch has them. Collective where
    a batch does not have those of all ranks (`StepInfo.uids`). Rows are copied only while their minibatch is read.

    Args:
        work: the credited batches.
        parts: minibatches of an epoch.
        seeds: of the order of groups in each epoch.
        world: the ranks.
    """

    def __init__(self, work: Mapping[str, Batch], parts: int, seeds: Sequence[int], world: World) -> None:
        self._work = work
        self._rows: list[dict[str, Tensor]] = [{} for _ in range(parts * len(seeds))]
        """row numbers of each minibatch, by credit key; of whole batches none"""
        if parts == 1:
            return
        ids = {key: batch.extras.get("uids_N", batch.group_N) for key, batch in work.items()}
        asked = {key: ids_N.unique().tolist() for key, ids_N in ids.items() if not work[key].step.uids}
        everyone = world.gather(asked) if asked else []
        for key, ids_N in ids.items():
            groups = torch.tensor(work[key].step.uids or sorted(set().union(*(each[key] for each in everyone))))
            for epoch, seed in enumerate(seeds):
                order = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
                for part, chosen in enumerate(order.tensor_split(parts)):
                    self._rows[epoch * parts + part][key] = torch.isin(ids_N, chosen).nonzero().flatten()

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        for rows in self._rows:
            yield {key: batch.rows(rows[key]) if key in rows else batch for key, batch in self._work.items()}
