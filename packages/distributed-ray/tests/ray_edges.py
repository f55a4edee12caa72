"""Providers that make a step go wrong, for runs whose workers find them by `ray_edges:Name`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlhf_core.contract.batch import Batch, Rollouts
from rlhf_core.contract.providers import Advantage, Loss
from rlhf_core.contract.results import Credit, LossTerms, Reduction, RewardOutput
from rlhf_core.contract.roles import Trainable
from rlhf_core.strategy.torch import TorchStrategy, TorchTrainable
from rlhf_core.testing.tiny_algorithm import TinyLoss


@dataclass(frozen=True)
class Few(Advantage):
    """The reward less a half, of the completions of the first prompts only; in the second step of none."""

    prompts: int = 1
    """of how many prompts"""

    needs: ClassVar[frozenset[str]] = frozenset()
    selects: ClassVar[str] = "rows"

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, torch.Tensor]) -> Credit:
        keep = 0 if rollouts.step.number == 2 else self.prompts
        rows = (rollouts.group_N < keep).nonzero().flatten()
        return Credit(torch.where(rollouts.mask_NT, rewards.rewards_N[:, None] + 0.5, 0.0), rows=rows)


@dataclass(frozen=True)
class Broken(Loss):
    """A policy gradient that is nan in the second step."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> LossTerms:
        values_NT = TinyLoss()(outputs, batch).values
        return LossTerms(values_NT * math.nan if batch.step.number == 2 else values_NT, Reduction("token"))


class ZeroedTrainable(TorchTrainable):
    """Sends every `down_proj` as zeros, as an engine would see it if that weight had not arrived."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().weights():
            yield name, torch.zeros_like(tensor) if "down_proj" in name else tensor


@dataclass(frozen=True)
class Zeroed(TorchStrategy):
    """The strategy torch, with a fault planted in what it sends."""

    def __call__(self, build: Any, optim: Any, total_steps: int) -> Trainable:
        trainable = super().__call__(build, optim, total_steps)
        if optim is not None:  # not the copy that an engine compares itself with
            trainable.__class__ = ZeroedTrainable
        return trainable
