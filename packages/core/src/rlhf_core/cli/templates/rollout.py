"""Template of `new-plugin --kind rollout`: a rollout and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --rollout $name --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_core import Prompts, Registry, Role, Rollout, Rollouts, Sampling, hookimpl


@dataclass(frozen=True)
class $cls(Rollout):
    """Core's engine `hf` with a limit on the length of completions.

    An engine of your own builds its `Rollouts` here, takes the weights (`role.weights()`) in `sync`, and frees them in `close`.
    """

    at_most: int = 64
    """maximum number of tokens per completion, below --sampling.max-new-tokens"""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        engine: Rollout = Registry(autoload=False).resolve("rollout", "hf")()
        return engine(role, prompts, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.at_most)))

    def sync(self, role: Role) -> Mapping[str, float]:
        return {}  # `hf` samples from the role's own weights


@hookimpl
def rlhf_rollout() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_rollout

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_rollout($cls())
"""
