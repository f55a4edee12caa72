"""`--reward length`: closeness of a completion to a target length. Its optimum is known, which suits first experiments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_core.contract.providers import Reward

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts

__all__ = ["Length"]


@dataclass(frozen=True)
class Length(Reward):
    """Closeness to a target length: 0 at the target, and 1 less for each target length of distance."""

    target: int = 32
    """target length, in `unit`"""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """unit of length; tokens include the EOS"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        if self.unit == "tokens":
            lengths = rollouts.lengths_N.tolist()
        else:
            count: Callable[[str], int] = len if self.unit == "characters" else lambda text: len(text.split())
            lengths = [count(text) for text in rollouts.texts]
        return [-abs(length - self.target) / self.target for length in lengths]
