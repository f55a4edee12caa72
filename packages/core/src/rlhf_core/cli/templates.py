"""What `new-plugin` writes, by kind. `$name` and the like are filled in; everything else is the author's file."""

from __future__ import annotations

__all__ = ["MODULES", "PYPROJECT", "README", "RUN", "TEST"]

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$dist"
version = "0.1.0"
description = "A $kind for rlhf-core."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["rlhf-core>=0.1,<0.2"]

[project.entry-points.rlhf]
$name = "$module"
"""

README = """\
# $dist

Adds the $kind `$name` to rlhf-core.

    python3 -m pip install -e .
    rlhf-run plugins --kind $kind
    $run

Change `$module.py`: the fields of the class are the options, calling it does the work. `python3 -m pytest` checks that
it keeps the contract; compare its numbers with a formula of your own too.
"""

RUN = {
    "data": "rlhf-run sft --model tiny --data $name --steps 3",
    "reward": "rlhf-run grpo --model tiny --data prompts --reward $name --steps 3",
    "advantage": "rlhf-run grpo --model tiny --data prompts --reward length --advantage $name --steps 3",
    "loss": "rlhf-run grpo --model tiny --data prompts --reward length --loss $name --steps 3",
    "evaluator": "rlhf-run grpo --model tiny --data prompts --reward length --evaluator $name --steps 3",
}

TEST = """\
from $module import $cls
from rlhf_core.testing import check_$kind


def test_it_keeps_the_contract() -> None:
    check_$kind($cls())
"""

_DATA = '''\
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_core import Data, Example, hookimpl


@dataclass(frozen=True)
class $cls(Data):
    """Sums of small numbers, with their answers."""

    rows: int = 100
    """how many rows"""

    def __call__(self, split: str) -> Sequence[Example]:
        offset = 0 if split == "train" else self.rows
        numbers = range(offset, offset + self.rows)
        return [Example(f"{i} + {i} =", (f" {i + i}",), label=i + i, origin=f"$name:{i}") for i in numbers]


@hookimpl
def rlhf_data() -> dict[str, type]:
    return {"$name": $cls}
'''

_REWARD = '''\
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

_ADVANTAGE = '''\
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
    """what is subtracted from each reward"""

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        return (rewards.rewards_N - self.baseline)[:, None] * rollouts.mask_NT


@hookimpl
def rlhf_advantage() -> dict[str, type]:
    return {"$name": $cls}
'''

_LOSS = '''\
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rlhf_core import Batch, Loss, LossTerms, Outputs, Reduction, hookimpl


@dataclass(frozen=True)
class $cls(Loss):
    """Advantage times negative log-likelihood (Williams 1992), averaged over tokens."""

    scale: float = 1.0
    """multiplies the loss"""

    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(-self.scale * batch["advantages_NT"] * outputs["logprobs_NT"], Reduction("token"))


@hookimpl
def rlhf_loss() -> dict[str, type]:
    return {"$name": $cls}
'''

_EVALUATOR = '''\
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_core import Evaluator, Run, hookimpl


@dataclass(frozen=True)
class $cls(Evaluator):
    """The length of the policy's parameter vector: how far it moves while it is trained."""

    digits: int = 6
    """decimal places"""

    def __call__(self, run: Run) -> Mapping[str, float]:
        policy = next(role for name, role in run.roles.items() if run.plan.roles[name].trained)
        squares = sum(float(tensor.double().square().sum()) for _, tensor in policy.weights())
        return {"$name/norm": round(squares**0.5, self.digits)}


@hookimpl
def rlhf_evaluator() -> dict[str, type]:
    return {"$name": $cls}
'''

MODULES = {"data": _DATA, "reward": _REWARD, "advantage": _ADVANTAGE, "loss": _LOSS, "evaluator": _EVALUATOR}
