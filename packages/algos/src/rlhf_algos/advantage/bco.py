"""The reward shift of BCO: what chosen and rejected completions are both compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_algos.pairs import sequence_logprobs
from rlhf_core.contract.distributed import World
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.results import RewardOutput

__all__ = ["BCOCredit"]


@dataclass(frozen=True)
class BCOCredit(Advantage):
    """The mean of log(pi / ref) over all completions seen so far, chosen and rejected ones alike (Jung et al. 2024, BCO).

    Each batch of all ranks counts once, this step's too; the mean is part of checkpoints. Returns hold it at each token.
    Advantages are +1 and -1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"actor.logprobs_NT", "ref_logprobs_NT"})

    def open(self, context: OpenContext) -> BCOEngine:
        """Open a mean of nothing."""
        return BCOEngine()


class BCOEngine:
    """The running mean."""

    def __init__(self) -> None:
        self.total, self.batches = 0.0, 0

    def __call__(self, rewards: RewardOutput, rollouts: Any, extras: Mapping[str, Tensor]) -> Credit:
        mask_NT, world = rollouts.mask_NT, rollouts.world or World()
        ratios_N = sequence_logprobs((extras["actor.logprobs_NT"] - extras["ref_logprobs_NT"]).double(), mask_NT)
        total, rows = world.sum(torch.tensor([float(ratios_N.sum()), len(ratios_N)], dtype=torch.float64)).tolist()
        self.total, self.batches = self.total + total / max(rows, 1), self.batches + 1
        z = self.total / self.batches
        sign_N = torch.tensor([1.0, -1.0]).repeat(len(mask_NT) // 2)
        return Credit(sign_N[:, None] * mask_NT, z * mask_NT.float(), metrics={"bco/z": z})

    def state_dict(self) -> Mapping[str, Any]:
        return {"total": self.total, "batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.batches = float(state["total"]), int(state["batches"])

    def close(self) -> None:
        """Nothing to do."""
