"""`--data reasoning`: puzzles that are made up on the spot, with `--reward reasoning` as their verifier.

Stojanovski et al. 2025, "Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards": more
than a hundred generators of tasks, offline and without end. Held-out rows come from seeds that training does not reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, overload

from rlhf_core.contract.batch import Example
from rlhf_core.data.mixture import concatenate
from rlhf_core.data.prepare import Preparation
from rlhf_core.errors import MissingPackage, UsageError, option
from rlhf_core.util.suggestions import did_you_mean

__all__ = ["ENTRY", "ReasoningData", "library"]

ENTRY = "reasoning_gym"
"""The key in `meta` under which an entry goes to the verifier."""
ASK = "Give the final answer between <answer> and </answer>."


@dataclass(frozen=True)
class ReasoningData(Preparation):
    """Procedural reasoning tasks of reasoning-gym, each with its verifier."""

    tasks: tuple[str, ...] = ("chain_sum",)
    """names of generators in reasoning-gym: chain_sum, leg_counting, …; several are mixed evenly"""
    _: KW_ONLY
    size: int = 1000
    """number of rows of each task"""
    heldout: int = 50
    """number of held-out rows of each task"""
    task_seed: int = 0
    """seed of the tasks; the same seed makes the same ones"""
    ask: str = ASK
    """text put after each question"""

    def __call__(self, split: str) -> Sequence[Example]:
        # entry i of a generator depends on seed + i: held-out rows come after all training rows
        seed, size = (self.task_seed + self.size, self.heldout) if split == "heldout" else (self.task_seed, self.size)
        return concatenate([_Tasks(_generator(name, seed, size), name, self.ask) for name in self.tasks])


@dataclass(frozen=True)
class _Tasks(Sequence[Example]):
    """The entries of one generator, made when they are asked for."""

    entries: Any
    name: str
    ask: str

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self.entries[index]
        return Example(
            prompt=f"{entry['question']}\n\n{self.ask}".strip(),
            label=entry["answer"],
            meta={"datasource": self.name, ENTRY: entry},
            origin=f"{self.name}:{index + 1}",
        )


def _generator(name: str, seed: int, size: int) -> Any:
    gym = library()
    known = gym.factory.DATASETS
    if name not in known:
        raise UsageError(f"{option('tasks')}: reasoning-gym has no task {name!r}{did_you_mean(name, known)}")
    return gym.create_dataset(name, seed=seed, size=size)


def library() -> Any:
    """The package reasoning-gym.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError:
        raise MissingPackage("reasoning tasks need a package: pip install 'rlhf-core[reasoning]'") from None
    return reasoning_gym
