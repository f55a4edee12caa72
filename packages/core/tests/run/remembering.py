"""Providers of each kind whose engines remember something, for tests of resumed runs; ranks import this module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.contract.engines import OpenContext
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.contract.providers import Advantage, Data, Evaluator, Observer, Reward
from rlhf_core.contract.results import RewardOutput

ROWS = 8


@dataclass
class Numbers:
    """An engine that remembers a list of numbers."""

    context: OpenContext
    numbers: Any = ()

    def close(self) -> None:
        """Nothing is open."""

    def state_dict(self) -> Mapping[str, Any]:
        return {"numbers": torch.tensor(self.numbers, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.numbers = tuple(state["numbers"].tolist())


@dataclass(frozen=True)
class Wandering(Data):
    """Rows in an order that depends on all rows read before."""

    def open(self, context: OpenContext) -> Wanderer:
        return Wanderer(context)


class Wanderer(Numbers):
    """After row i of n rows read comes row 3 i + n + 1, modulo the number of rows."""

    def __call__(self, split: str) -> Any:
        return self if split == "train" else []

    def __iter__(self) -> Iterator[Example]:
        while True:
            before = self.numbers or (0.0, 0.0)
            self.numbers = ((3 * before[0] + before[1] + 1) % ROWS, before[1] + 1)
            yield Example(f"{'Why so? ' * int(self.numbers[0])}{self.numbers[0]:.0f}")


@dataclass(frozen=True)
class Novelty(Reward):
    """More for completions that are longer than those before them."""

    def open(self, context: OpenContext) -> NoveltyEngine:
        return NoveltyEngine(context)


class NoveltyEngine(Numbers):
    """Compares with the mean length of all completions of this rank so far."""

    def __call__(self, rollouts: Rollouts) -> Sequence[float]:
        total, count = self.numbers or (0.0, 0.0)
        mean = total / count if count else 0.0
        lengths = rollouts.lengths_N.tolist()
        self.numbers = (total + sum(lengths), count + len(lengths))
        return [length - mean for length in lengths]


@dataclass(frozen=True)
class Smoothed(Advantage):
    """The reward less a moving average of it."""

    def open(self, context: OpenContext) -> SmoothedEngine:
        return SmoothedEngine(context)


class SmoothedEngine(Numbers):
    """Remembers the moving average."""

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (before,) = self.numbers or (0.0,)
        now = self.context.world.total(float(rewards.rewards_N.sum())) / self.context.world.total(len(rollouts))
        self.numbers = (0.9 * before + 0.1 * now,)
        return torch.where(rollouts.mask_NT, rewards.rewards_N[:, None] - self.numbers[0], 0.0)


@dataclass(frozen=True)
class Times(Evaluator):
    """Counts the evaluations so far."""

    samples = False

    def open(self, context: OpenContext) -> TimesEngine:
        return TimesEngine(context)


class TimesEngine(Numbers):
    """Returns how often it was called."""

    def __call__(self, run: Any) -> Mapping[str, float]:
        self.numbers = (sum(self.numbers) + 1,)
        return {"times": self.numbers[0]}


@dataclass(frozen=True)
class Diary(Observer):
    """Writes the losses of all steps, as it remembers them, to OUTPUT/diary.txt when a run ends."""

    def __call__(self, run: Any) -> DiaryWatch:
        return DiaryWatch()


class DiaryWatch:
    """Remembers a loss per step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    @hookimpl
    def rlhf_run_start(self, run: Any) -> None:
        assert len(self.losses) == run.step, "the state is there before observers are called"

    @hookimpl
    def rlhf_step_end(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        self.losses.append(metrics["loss/actor"])

    @hookimpl
    def rlhf_run_end(self, run: Any, error: BaseException | None) -> None:
        (run.output / "diary.txt").write_text("\n".join(map(str, self.losses)))

    def state_dict(self) -> Mapping[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses = list(state["losses"])
