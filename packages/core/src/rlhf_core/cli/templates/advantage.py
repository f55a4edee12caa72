"""Template of `new-plugin --kind advantage`: an advantage and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --advantage $name --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_core import Advantage, RewardOutput, Rollouts, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class $cls(Advantage):
    """The reward minus a fixed baseline, on every sampled token."""

    baseline: float = 0.0
    """number that is subtracted from each reward"""

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        return (rewards.rewards_N - self.baseline)[:, None] * rollouts.mask_NT


@hookimpl
def rlhf_advantage() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_advantage

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_advantage($cls())
"""
