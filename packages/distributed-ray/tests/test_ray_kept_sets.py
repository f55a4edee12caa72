"""Kept sets cross the object store with their rows, and only to the role that sampled them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_core.contract.kept_sets import KeptSets, Truncation
from rlhf_core.testing.batches import make_batch
from rlhf_distributed_ray.transport import Shipper, unpack


def test_kept_sets_arrive_row_by_row() -> None:
    sets: Any = [KeptSets.from_lists([[3, 5], [7]]), KeptSets.from_lists([[1]]), KeptSets.whole(3)]
    shipper = Shipper(put=lambda packed: packed)
    batch = replace(make_batch([2, 1, 3]), kept_sets=sets)
    arrived = unpack(shipper.columns(batch, [2, 0])).kept_sets
    assert [each.counts_T.tolist() for each in arrived] == [[0, 0, 0], [2, 1]]  # type: ignore[union-attr]
    assert [each.ids_K.tolist() for each in arrived] == [[], [3, 5, 7]]  # type: ignore[union-attr]
    assert unpack(shipper.columns(batch.read_by("reference", "actor"), [0])).kept_sets == []
    rules: Any = [Truncation(top_p=0.9)] * 3
    assert unpack(shipper.columns(replace(make_batch([2, 1, 3]), kept_sets=rules), [1])).kept_sets == rules[:1]
