"""Template of `new-plugin --kind filter`: a filter and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --filter $name --steps 3"

MODULE = '''\
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core import Filter, RewardOutput, Rollouts, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class $cls(Filter):
    """Prompts with at least one completion that scores above a bound."""

    above: float = -100.0
    """score that the best completion of a prompt has to exceed"""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> Tensor:
        import torch

        groups, index_N = torch.unique(rollouts.group_N, return_inverse=True)
        best_P = torch.zeros(len(groups), dtype=torch.float64)
        best_P = best_P.scatter_reduce(0, index_N, rewards.outcome_N, "amax", include_self=False)
        return best_P > self.above


@hookimpl
def rlhf_filter() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_filter

from $module import $cls


def test_it_keeps_the_contract() -> None:
    assert check_filter($cls(above=0.0)).all()
    assert not check_filter($cls(above=1.0)).any()
"""
