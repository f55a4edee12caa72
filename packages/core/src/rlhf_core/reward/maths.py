"""`--reward math`: whether the final answer of a completion equals the label's, as mathematics and not as text.

Answers are found and compared by math-verify: in a box, after "####", or the last expression there is. Comparing may run
for ever (9**9**9), so it happens in a worker process that is killed after a while; then the answer counts as wrong.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import DataError, MissingPackage
from rlhf_core.lazy import torch
from rlhf_core.reward.output import require_labels
from rlhf_core.util.worker_processes import Failure, Workers

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext

__all__ = ["Maths", "grade"]

TARGET = "rlhf_core.reward.maths:grade"
MARK = "####"
"""Mark before the final answer in GSM8K."""

Where = Literal["any", "boxed", "marked"]


@dataclass(frozen=True)
class Maths(Reward):
    """1 if the completion's final answer equals the label's (after "####", boxed, or a bare expression), else 0."""

    where: Where = "any"
    r"""place where an answer counts: anywhere, only in \boxed{}, or only after ####"""
    timeout: float = 10.0
    """seconds after which an answer that cannot be compared counts as wrong"""
    workers: int = 1
    """number of processes that compare answers"""

    def check(self) -> None:
        """Raise UsageError if the comparing package is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise MissingPackage("reward math compares with math-verify: pip install 'rlhf-core[math]'")

    def open(self, context: OpenContext) -> MathsEngine:
        """Make the processes, which start at the first call."""
        return MathsEngine(self)


class MathsEngine:
    """The processes that compare.

    Args:
        reward: its options.
    """

    def __init__(self, reward: Maths) -> None:
        self.reward = reward
        self.workers = Workers(reward.workers, TARGET, ())

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        self.reward.check()
        require_labels(rollouts, "math")
        calls = [(text, str(label), self.reward.where) for text, label in zip(rollouts.texts, rollouts.labels)]
        grades = self.workers.map(calls, self.reward.timeout)
        if None in grades:
            raise DataError(f"reward math: the label {rollouts.labels[grades.index(None)]!r} contains no answer")
        gave_up = [isinstance(grade, Failure) for grade in grades]
        right, answered = zip(*((0.0, 0.0) if late else grade for grade, late in zip(grades, gave_up)))
        return RewardOutput(
            rewards_N=torch.tensor(right),
            metrics={"answered": torch.tensor(answered), "gave_up": torch.tensor(gave_up).float()},
        )

    def close(self) -> None:
        """End the processes."""
        self.workers.close()


def prepare_worker() -> None:
    """In a worker: import before the clock of the first answer starts."""
    import math_verify  # noqa: F401


def grade(text: str, label: str, where: Where) -> tuple[float, float] | None:
    """(right, answered), each 0 or 1; None if the label has no answer."""
    from math_verify import parse, verify

    gold = _parse_gold(_strip_label(label))
    if not gold:
        return None
    answer = _answer(text, where)
    found: Any = parse(answer) if answer else []
    return float(bool(found) and verify(gold, found)), float(bool(found))


def _strip_label(label: str) -> str:
    return label.rpartition(MARK)[2].strip()


def _parse_gold(gold: str) -> Any:
    """Return the reference: unchanged if it marks the answer, else all of it is the answer."""
    from math_verify import parse

    return parse(gold if "\\boxed" in gold or "$" in gold else f"${gold}$")


def _answer(text: str, where: Where) -> str:
    """The part of a completion in which an answer counts."""
    marked = text.rpartition(MARK)
    if marked[1] and where != "boxed":
        return marked[2].strip().split("\n")[0]
    if where == "marked" or (where == "boxed" and "\\boxed" not in text):
        return ""
    return text[text.rindex("\\boxed") :] if "\\boxed" in text else text
