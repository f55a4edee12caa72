"""Rows of two sources in one batch, prompt by prompt, such as demonstrations and the samples of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.plan import Plan
from rlhf_core.lazy import torch

__all__ = ["join_rows", "join_sources"]


def join_sources(plan: Plan, batches: Mapping[str, Batch]) -> dict[str, Batch]:
    """Return the batches that credits with two sources read, by their names."""
    return {
        spec.source: join_rows(*(batches[part] for part in spec.parts)) for spec in plan.credits.values() if spec.parts
    }


def join_rows(first: Batch, second: Batch) -> Batch:
    """Return the rows of `first`, and after those of each prompt the rows that `second` has of it.

    Prompts are known by `uids_N`; those that only one of the two has are left out. Of extras, the common ones stay, and
    `joined_N` is 1 in the rows of `second`. Kept sets are left out: rows of data have none.
    """
    common = sorted(first.extras.keys() & second.extras.keys())
    both = Batch.cat(
        [replace(each, kept_sets=[], extras={name: each[name] for name in common}) for each in (first, second)]
    )
    joined_N = torch.cat([torch.zeros(len(first)), torch.ones(len(second))])
    uids = both["uids_N"].tolist()
    place = {
        uid: i for i, uid in enumerate(dict.fromkeys(first["uids_N"].tolist())) if uid in second["uids_N"].tolist()
    }
    kept = [i for i, uid in enumerate(uids) if uid in place]
    order = sorted(kept, key=lambda i: place[uids[i]])  # stable: rows of `first` stay before those of `second`
    rows = both.with_extras(joined_N=joined_N).rows(order)
    rows.group_N = torch.tensor([place[uids[i]] for i in order])
    return rows
