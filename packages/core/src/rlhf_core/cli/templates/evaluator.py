"""Template of `new-plugin --kind evaluator`: an evaluator and its test."""

from __future__ import annotations

__all__ = ["MODULE", "RUN", "TEST"]

RUN = "rlhf-run grpo --model tiny --data prompts --reward length --evaluator $name --steps 3"

MODULE = '''\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_core import Evaluator, RunView, hookimpl


@dataclass(frozen=True)
class $cls(Evaluator):
    """The length of the policy's parameter vector: how far it moves while it is trained."""

    digits: int = 6
    """number of decimal places"""

    def __call__(self, run: RunView) -> Mapping[str, float]:
        policy = next(role for name, role in run.roles.items() if run.plan.roles[name].trained)
        squares = sum(float(tensor.double().square().sum()) for _, tensor in policy.weights())
        return {"$name/norm": round(squares**0.5, self.digits)}


@hookimpl
def rlhf_evaluator() -> dict[str, type]:
    return {"$name": $cls}
'''

TEST = """\
from rlhf_core.testing import check_evaluator

from $module import $cls


def test_it_keeps_the_contract() -> None:
    check_evaluator($cls())
"""
