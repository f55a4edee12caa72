"""The partners of AOT: whom the whole batch, sorted, compares each pair or completion with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_algos.pairs import sequence_logprobs, split_pairs
from rlhf_core.contract.distributed import World
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.results import RewardOutput

__all__ = ["AOTCredit", "match_by_rank"]


@dataclass(frozen=True)
class AOTCredit(Advantage):
    """The optimal coupling of two distributions on a line: the k-th smallest meets the k-th smallest (Melnyk et al. 2024).

    Returns hold the partner at each token. They are found once a step over the whole batch of all ranks, so that neither
    ranks nor micro-batches change them. Advantages are +1 and -1.
    """

    paired: bool = True
    """match pairs: the policy's log-ratios of chosen to rejected with the reference's. False matches chosen with
    rejected completions by log(pi / ref)"""

    needs: ClassVar[frozenset[str]] = frozenset({"actor.logprobs_NT", "ref_logprobs_NT"})

    def __call__(self, rewards: RewardOutput, rollouts: Any, extras: Mapping[str, Tensor]) -> Credit:
        mask_NT, world = rollouts.mask_NT, rollouts.world or World()
        policy_N = sequence_logprobs(extras["actor.logprobs_NT"].double(), mask_NT)
        reference_N = sequence_logprobs(extras["ref_logprobs_NT"].double(), mask_NT)
        if self.paired:
            policy_w, policy_l = split_pairs(policy_N, rollouts)
            reference_w, reference_l = split_pairs(reference_N, rollouts)
            partner_N = match_by_rank(policy_w - policy_l, reference_w - reference_l, world).repeat_interleave(2)
        else:
            chosen, rejected = split_pairs(policy_N - reference_N, rollouts)
            partners = match_by_rank(chosen, rejected, world), match_by_rank(rejected, chosen, world)
            partner_N = torch.stack(partners, 1).flatten()
        sign_N = torch.tensor([1.0, -1.0]).repeat(len(mask_NT) // 2)
        return Credit(sign_N[:, None] * mask_NT, partner_N.float()[:, None] * mask_NT)


def match_by_rank(own: Tensor, others: Tensor, world: World) -> Tensor:
    """Return, for each of `own`, the value of `others` with the same rank in order, both over all ranks; (P,) each."""
    gathered = world.gather((own, others))
    everyone, their = (torch.cat([each[side] for each in gathered]) for side in (0, 1))
    matched = torch.empty_like(their)
    matched[everyone.argsort(stable=True)] = their.sort().values
    first = sum(len(each[0]) for each in gathered[: world.rank])
    return matched[first : first + len(own)]
