"""A curriculum: the rows whose mean score is nearest a target come next.

With `target` 0.5 and scores in 0..1 these are the rows that completions solve half of the time, where rewards vary most. Each
row r has a running mean m_r of its scores, and the next row has the smallest

    |m_r - target| * decay ** (updates since r was scored),    `unseen` in place of |m_r - target| before the first score,

so that rows that were too easy or too hard come again later. Ties follow a permutation drawn from the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_core import OptionError, Sampler, UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Curriculum"]


@dataclass(frozen=True)
class Curriculum(Sampler):
    """Rows whose mean score is nearest a target come first."""

    target: float = 0.5
    """mean score of the rows that come first"""
    unseen: float = 0.25
    """distance to the target of a row without scores; smaller values see more rows early"""
    rate: float = 0.5
    """weight of a row's newest scores in its running mean, above 0 and at most 1"""
    decay: float = 0.95
    """factor on a row's distance per update without new scores, above 0 and at most 1; 1 never returns to a far row"""

    def __post_init__(self) -> None:
        for name in ("rate", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(name, f"must be above 0 and at most 1, not {getattr(self, name)}")

    def open(self, context: object) -> CurriculumEngine:
        return CurriculumEngine(self)


class CurriculumEngine:
    """Statistics of a run's rows, in float64. Arrays have the rows in the order of the permutation."""

    def __init__(self, options: Curriculum) -> None:
        self.options = options
        self.updates = 0
        self.mean_R = np.zeros(0)
        """running mean of scores; nan before the first"""
        self.scored_R = np.zeros(0, dtype=np.int64)
        """update that scored a row last"""
        self.waiting_R = np.zeros(0, dtype=bool)
        """True where a row was drawn and has no score yet"""
        self.place_R = np.zeros(0, dtype=np.int64)
        """place of each row number"""

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        """Yield the row that is best at the time when it is asked for."""
        number_R = np.random.default_rng(seed).permutation(rows)
        self.place_R = number_R.argsort()
        if not len(self.mean_R):
            self.mean_R, self.scored_R = np.full(rows, np.nan), np.zeros(rows, dtype=np.int64)
            self.waiting_R = np.zeros(rows, dtype=bool)
        if len(self.mean_R) != rows:
            raise UsageError(
                f"the curriculum remembers {len(self.mean_R)} rows, and the data has {rows}; resume with the same data"
            )
        while True:
            if self.waiting_R.all():
                self.waiting_R[:] = False
            place = int(np.where(self.waiting_R, np.inf, self.distance_R()).argmin())
            self.waiting_R[place] = True
            yield int(number_R[place])

    def distance_R(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the distance of each row to the target, decayed."""
        options = self.options
        far_R = np.where(np.isnan(self.mean_R), options.unseen, np.abs(self.mean_R - options.target))
        decayed_R: np.ndarray[Any, np.dtype[np.float64]] = far_R * options.decay ** (self.updates - self.scored_R)
        return decayed_R

    def update(self, row_N: Tensor, scores_N: Tensor) -> None:
        """Take the mean score of each row into its running mean."""
        self.updates += 1
        numbers_N, values_N = row_N.numpy(), scores_N.numpy()
        for number in np.unique(numbers_N):
            place, score = self.place_R[number], values_N[numbers_N == number].mean()
            before = self.mean_R[place]
            self.mean_R[place] = score if np.isnan(before) else before + self.options.rate * (score - before)
            self.scored_R[place], self.waiting_R[place] = self.updates, False

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        import torch

        arrays = {"mean": self.mean_R, "scored": self.scored_R, "waiting": self.waiting_R}
        return {"updates": self.updates, **{name: torch.tensor(values) for name, values in arrays.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.updates = state["updates"]
        self.mean_R, self.scored_R, self.waiting_R = (state[name].numpy() for name in ("mean", "scored", "waiting"))

    def close(self) -> None:
        """Nothing is open."""
