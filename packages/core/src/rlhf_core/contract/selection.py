"""Base classes of samplers, which choose rows of data, and filters, which choose sampled groups.

A provider is a frozen dataclass that subclasses one of them, as for the kinds in `rlhf_core.contract.providers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf_core.contract.capability import replaceable
from rlhf_core.contract.providers import Provider

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["Filter", "Sampler"]


class Filter(Provider):
    """Chooses the groups that are trained on. `--algorithm.dynamic.*` controls how many prompts replace others."""

    def __call__(self, rollouts: Rollouts, rewards: RewardOutput) -> Tensor:
        """Return True for each group to train on, bool_P.

        P is the number of groups of this rank, in the order of their numbers (`rollouts.group_N.unique()`). Rewards are not
        shaped yet. Every rank calls it in the same rounds, so that it may sum over `rollouts.world`.
        """
        raise NotImplementedError


@replaceable
class Sampler(Provider):
    """Chooses the rows that come next, and gives their numbers. Every rank draws the same numbers.

    One that `reacts` to scores must define `state_dict` and `load_state_dict`. If it has an `open`, the object that `open`
    returns must define them. A resumed run first loads the state, then calls with `rows` and `seed`. A sampler that does not
    react is called with the same `rows` and `seed` again, and the run discards as many numbers as it had used.
    """

    @property
    def reacts(self) -> bool:
        """True if scores change which rows come next; False if these follow from `rows` and `seed` alone."""
        return True

    @property
    def lookahead(self) -> int:
        """If the sampler reacts: batches of `--batch-size` rows that are drawn early; with 0, scores affect the next batch."""
        return 0

    @property
    def runs_ahead(self) -> bool:
        """True if it may run in the background, because it draws from no global random generator.

        Otherwise it is asked in the loop, and `random`, numpy and torch are seeded for each number.
        """
        return False

    @property
    def epochs(self) -> bool:
        """True if every row comes once before any comes again. Only then data without a length is allowed, in its own order."""
        return False

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        """Return an endless iterator of row numbers, from 0 to `rows` - 1."""
        raise NotImplementedError

    def update(self, row_N: Tensor, scores_N: Tensor) -> None:
        """Take in what rows earned: int64 and float64, one value per completion, those of all ranks in the order of drawing.

        Called after each scoring. Some drawn rows never arrive here: those that were too long, and those from which the
        reward abstained.
        """
