"""Scored completions as bytes, for the rank that lacks some: tensors as they are in memory, and texts as UTF-8.

Only what the user's data brings along, labels and metadata of types that JSON does not have, is pickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.lazy import torch
from rlhf_core.util.tensor_tree import plain_tree, tree_from_bytes, tree_to_bytes

__all__ = ["from_bytes", "to_bytes"]

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

OF_THE_RANK = ("step", "world")
"""Fields of a batch that come from its receiver."""
OF_THE_DATA = ("labels", "meta")
"""Fields that hold whatever the rows of data do."""


def to_bytes(scored: ScoredRollouts) -> bytes:
    """Return scored completions for another rank."""
    rollouts = {each.name: vars(scored.rollouts)[each.name] for each in fields(scored.rollouts)}
    for name in OF_THE_RANK:
        del rollouts[name]
    for name in OF_THE_DATA:
        rollouts[name] = _data_tree(rollouts[name])
    rollouts["kept_sets"] = [vars(each) for each in scored.rollouts.kept_sets]
    rollouts["images"] = [dict(each) for each in scored.rollouts.images]
    rewards = {name: dict(each) if isinstance(each, Mapping) else each for name, each in vars(scored.rewards).items()}
    return tree_to_bytes({"rollouts": rollouts, "rewards": rewards, "failed": scored.failed})


def from_bytes(data: bytes, like: Rollouts) -> ScoredRollouts:
    """Return the completions in `data`, with the step and the ranks of `like`."""
    tree = tree_from_bytes(data)
    columns = tree["rollouts"]
    for name in OF_THE_DATA:
        columns[name] = _data_of(columns[name])
    columns["kept_sets"] = [
        KeptSets(**each) if "counts_T" in each else Truncation(**each) for each in columns["kept_sets"]
    ]
    return ScoredRollouts(replace(like, **columns), RewardOutput(**tree["rewards"]), tree["failed"])


def _data_tree(column: list[Any]) -> Any:
    """Return a column as a tree that can be written; a column that cannot, as a tensor of its pickle."""
    try:
        return plain_tree(column)
    except TypeError:
        return torch.frombuffer(bytearray(pickle.dumps(column)), dtype=torch.uint8)


def _data_of(tree: Any) -> list[Any]:
    if isinstance(tree, torch.Tensor):
        return list(pickle.loads(tree.numpy().tobytes()))  # noqa: S301  # from a rank of this run
    return list(tree)
