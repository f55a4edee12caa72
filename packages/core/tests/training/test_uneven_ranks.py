"""Ranks that have different numbers of micro-batches: one that runs out repeats its last one, which must count nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_local_role import Square, role_of
from thread_ranks import ThreadWorld, together

from rlhf_core.contract.terms import Term
from rlhf_core.testing.batches import make_batch

LENGTHS = [5, 5, 1, 3, 4, 2]
SHARES = ([0], [1, 2, 3, 4, 5]), ([0, 1, 2, 3, 4, 5], []), ([0, 1, 2, 3], [4, 5])
"""Rows of the two ranks, in micro-batches of one row: 1 and 5 of them, 6 and none, 4 and 2."""


@pytest.mark.parametrize("per", ["token", "sequence", "constant", "sum"])
def test_a_rank_with_fewer_micro_batches_changes_no_gradient_and_no_loss(per: str) -> None:
    term = Term("actor", "data", Square(per))
    alone = role_of(term, micro_tokens=1)
    expected = alone.train({"data": make_batch(LENGTHS)})
    assert abs(float(alone.trainable.w.detach())) > 0.01, "it moves, or equality would say little"
    for shares in SHARES:

        def rank(world: ThreadWorld, shares: Any = shares) -> tuple[dict[str, float], float]:
            role = role_of(term, micro_tokens=1)
            role.world = role.trainable.world = world
            batch = make_batch(LENGTHS)
            batch.world = world
            return role.train({"data": batch.rows(shares[world.rank])}), float(role.trainable.w.detach())

        for metrics, w in together(rank, 2):
            assert w == pytest.approx(float(alone.trainable.w.detach()), rel=1e-5), shares
            for name in ("loss/actor", "grad_norm/actor", "actor/seen"):
                assert metrics[name] == pytest.approx(expected[name], rel=1e-5), (name, shares)


def test_ranks_exchange_counts_before_the_first_optimizer_step_and_scalars_after_the_last() -> None:
    """Train on two epochs of three minibatches, with 1 and 5 of six prompts, as one rank does; between, gradients alone."""
    term = Term("actor", "data", Square())
    options: dict[str, Any] = {"micro_tokens": 1, "minibatches": 3, "update_epochs": 2}
    whole = make_batch(LENGTHS).with_extras(uids_N=torch.arange(10, 10 + len(LENGTHS)))
    alone = role_of(term, **options)
    expected = [alone.train({"data": whole}) for _ in range(2)]

    def rank(world: ThreadWorld) -> tuple[list[dict[str, float]], list[int], float]:
        role = role_of(term, **options)
        role.world = role.trainable.world = world
        batch = whole.rows(SHARES[0][world.rank])
        told = replace(batch, world=world, step=replace(batch.step, uids=tuple(range(10, 16))))
        metrics, calls = [], []
        for rows in (replace(batch, world=world), told):
            metrics.append(role.train({"data": rows}))
            calls.append(world.calls)
        return metrics, calls, float(role.trainable.w.detach())

    for metrics, calls, w in together(rank, 2):
        assert w == pytest.approx(float(alone.trainable.w.detach()), rel=1e-5)
        for mine, one in zip(metrics, expected, strict=True):
            assert mine == pytest.approx(one, rel=1e-5)
        names, gradients = 2, 6
        assert calls == [2 + gradients + 1 + names, 2 + gradients + 1 + names + 1 + gradients + 1]
