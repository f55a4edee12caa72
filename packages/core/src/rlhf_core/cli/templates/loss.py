"""Template of `new-plugin --kind loss`: a loss and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --loss $name --steps 3"

MODULE = '''\
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlhf_core import Batch, Loss, LossTerms, Outputs, Reduction, hookimpl


@dataclass(frozen=True)
class $cls(Loss):
    """Advantage times negative log-likelihood (Williams 1992), averaged over tokens."""

    scale: float = 1.0
    """factor on the loss"""

    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-self.scale * batch["advantages_NT"] * outputs["logprobs_NT"], Reduction("token"))


@hookimpl
def rlhf_loss() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_loss

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_loss($cls())
"""
