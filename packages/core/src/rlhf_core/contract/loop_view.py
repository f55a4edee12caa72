"""Protocols of a run and its iterations: exactly the methods that `rlhf_core.loop` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.results import Metric, RewardOutput, ScoredRollouts
    from rlhf_core.contract.roles import Role

__all__ = ["LoopIteration", "LoopRun"]

T = TypeVar("T")


class LoopIteration(Protocol):
    """One pass of the loop, on its way from data to credit."""

    step: int
    """the step that it becomes, from 1"""
    plan: Plan
    """the part of the plan that takes part in this step"""
    batches: dict[str, Batch]
    """a batch per source, read or sampled"""
    rewards: dict[str, RewardOutput]
    """rewards of the sampled batches, by source"""

    def read(self) -> None:
        """Turn the rows of data into the batch of the source `data`."""
        ...

    def sample(self, source: str) -> Rollouts | ScoredRollouts:
        """Return completions of the role `source` on the rows' prompts; scored ones where scores chose the prompts."""
        ...

    def score(self, source: str, sampled: Rollouts | ScoredRollouts) -> None:
        """Score and shape completions unless they are scored, and keep them as the batch of `source`."""
        ...


class LoopRun(Protocol):
    """An open run."""

    @property
    def plan(self) -> Plan:
        """The whole plan."""
        ...

    @property
    def roles(self) -> Mapping[str, Role]:
        """The placed roles by name."""
        ...

    @property
    def advantages(self) -> Mapping[str, Any]:
        """The engines of advantages by credit key."""
        ...

    @property
    def kl_coef(self) -> float:
        """The KL coefficient in force."""
        ...

    def together(self, calls: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Make independent calls to roles, by role; at once where the launcher can."""
        ...

    def iterations(self, collect: Callable[[Any], None]) -> Iterator[Any]:
        """Yield the remaining iterations (`LoopIteration`), each collected."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Add the time inside to `time/<name>` of the step at hand."""
        ...

    def log(self, metrics: Mapping[str, float | Metric]) -> None:
        """Add metrics to the step at hand."""
        ...

    def watch(self, batches: Mapping[str, Batch]) -> None:
        """Log the age of sampled batches and the KL to the reference, which an adaptive coefficient follows."""
        ...

    def notify(self, hook: str, **arguments: Any) -> list[Any]:
        """Call an observer hook."""
        ...

    def sync(self) -> None:
        """Let the rollout engine take the new weights."""
        ...

    def finish(self, iteration: Any, credited: Mapping[str, Batch]) -> None:
        """Close a step: measure, call observers, and save if it is time."""
        ...
