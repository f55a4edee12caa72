"""Providers that draw from the global random generators, for `test_random`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.providers import Advantage, Reward


def draw() -> float:
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


@dataclass(frozen=True)
class Noise(Reward):
    """Rewards are noise."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        return [draw() for _ in rollouts.texts]


@dataclass(frozen=True)
class NoisyAdvantage(Advantage):
    """Advantages are noise."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: Any, rollouts: Any, extras: Mapping[str, torch.Tensor]) -> torch.Tensor:
        noise_N = torch.tensor([draw() for _ in rollouts.texts])
        return torch.where(rollouts.mask_NT, noise_N[:, None], 0.0)


def reward_func(completions: list[str], **_: Any) -> list[float]:
    """Noise, and the order of a set of texts."""
    first = next(iter({f"word {k}" for k in range(50)}))
    return [draw() + len(first) + hash(first) % 7 for _ in completions]
