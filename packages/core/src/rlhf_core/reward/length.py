"""`--reward length`: how near a completion is to a wanted length. Its optimum is known: good for trying things out."""

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
    """Nearness to a wanted length: 0 at the target, falling by 1 for each target's length away."""

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
