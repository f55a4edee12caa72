"""Template of `new-plugin --kind reward`: a reward and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward $name --steps 3"

MODULE = '''\
from dataclasses import dataclass

from rlhf_core import Reward, Rollouts, hookimpl


@dataclass(frozen=True)
class $cls(Reward):
    """1 for an empty answer, 0 from `limit` characters on."""

    limit: int = 400
    """characters at which the reward reaches zero"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [max(0.0, 1 - len(text) / self.limit) for text in rollouts.texts]


@hookimpl
def rlhf_reward() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_reward

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_reward($cls())
"""
