"""Metrics split by where a row is from, its column `datasource`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["means_by_source"]


def means_by_source(name: str, values_N: Tensor, meta: Sequence[Mapping[str, Any]], world: World) -> dict[str, float]:
    """`name/<datasource>`: the mean over the rows of all ranks that are from there. Rows without a source are not counted."""
    own = [str(each["datasource"]) if "datasource" in each else None for each in meta]
    sources = sorted(set().union(*world.gather({source for source in own if source is not None})))
    means: dict[str, float] = {}
    for source in sources:  # the same on every rank, some of which have none of its rows
        mine_N = torch.tensor([each == source for each in own], dtype=torch.bool)
        total, count = world.sum(torch.stack([values_N[mine_N].double().sum(), mine_N.double().sum()])).tolist()
        means[f"{name}/{source}"] = total / count
    return means
