"""The order of sampling and training as a state machine: no thread, no clock, no engine.

Iterations are sampled in order and trained on in order. Iteration b may begin as soon as iteration b - 1 - ahead is trained, so
that at most `ahead` iterations are sampled and not trained on when one begins to train. This is the bound on staleness: with u
optimizer updates per iteration, what is trained on is at most `ahead * u` updates old.

    begun    b1 b2 b3 b4          sampled at least in part
    sampled  b1 b2 b3             whole, waiting for training
    trained  b1
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IterationQueue"]


@dataclass
class IterationQueue:
    """Counts of what has begun, is sampled and is trained on; iterations are numbered from 1.

    Args:
        ahead: iterations that may be sampled before the ones that they follow are trained on.
        last: number of the last iteration of the run.
        trained: iterations that were trained on before, in a resumed run.
    """

    ahead: int
    last: int
    trained: int = 0

    def __post_init__(self) -> None:
        self.begun = self.sampled = self.trained

    @property
    def may_begin(self) -> bool:
        """True if the next iteration may be sampled now."""
        return self.sampled == self.begun < self.last and self.begun - self.trained <= self.ahead

    @property
    def may_train(self) -> bool:
        """True if an iteration waits to be trained on."""
        return self.sampled > self.trained

    def begin(self) -> int:
        """Return the number of the iteration that now begins to be sampled."""
        assert self.may_begin, f"iteration {self.begun + 1} begins too early: {self}"
        self.begun += 1
        return self.begun

    def complete(self) -> None:
        """Take in that the iteration under way is sampled."""
        assert self.sampled < self.begun, f"no iteration is under way: {self}"
        self.sampled += 1

    def train(self) -> int:
        """Return the number of the iteration that has now been trained on."""
        assert self.may_train, f"nothing is sampled: {self}"
        self.trained += 1
        return self.trained
