"""Ranks that have different numbers of micro-batches: one that runs out repeats its last one, which must count nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_local_role import Square, role_of

from rlhf_core.contract.distributed import World
from rlhf_core.contract.terms import Term
from rlhf_core.testing.batches import make_batch

SECONDS = 120.0


class Thread(World):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, board: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.meeting = rank, len(board), board, meeting

    def gather(self, thing: Any) -> list[Any]:
        self.board[self.rank] = thing
        self.meeting.wait(SECONDS)
        everything = list(self.board)
        self.meeting.wait(SECONDS)
        return everything

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.gather(tensor.detach().clone())).sum(0)


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
        board, meeting, found = [None, None], threading.Barrier(2), {}

        def rank(
            number: int, board: Any = board, meeting: Any = meeting, found: Any = found, shares: Any = shares
        ) -> None:
            role, world = role_of(term, micro_tokens=1), Thread(number, board, meeting)
            role.world = role.trainable.world = world
            batch = make_batch(LENGTHS)
            batch.world = world
            try:
                found[number] = role.train({"data": batch.rows(shares[number])}), float(role.trainable.w.detach())
            finally:
                if number not in found:
                    meeting.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in range(2):
            metrics, w = found[number]
            assert w == pytest.approx(float(alone.trainable.w.detach()), rel=1e-5), shares
            for name in ("loss/actor", "grad_norm/actor", "actor/seen"):
                assert metrics[name] == pytest.approx(expected[name], rel=1e-5), (name, shares)
