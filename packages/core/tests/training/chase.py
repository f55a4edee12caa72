"""An algorithm that samples a copy of the policy, with an average of it beside; also run as `chase:Chase` on ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core import (
    AdamW,
    Advantage,
    Algorithm,
    ModelOptions,
    ProviderChoices,
    Sampling,
    Term,
    Tracking,
    TrackingOptions,
    TrainedOptions,
)
from rlhf_core.lazy import torch
from rlhf_core.testing.tiny_algorithm import TinyAlgorithm, TinyLoss

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core import RewardOutput, Rollouts


@dataclass(frozen=True)
class AboveTarget(Advantage):
    """The reward of each token's average log-probability under the average of the policy; a number that moves with it."""

    needs: ClassVar[frozenset[str]] = frozenset({"target.logprobs_NT"})

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        return torch.where(rollouts.mask_NT, rewards.rewards_N[:, None] - extras["target.logprobs_NT"], 0.0)


@dataclass(frozen=True)
class Chase(Algorithm):
    """actor <- opponent, where the opponent is a copy of the actor and the target an average of it."""

    defaults: ClassVar[Mapping[str, str]] = TinyAlgorithm.defaults
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=1e-2)),
        "opponent": TrackingOptions(track=Tracking(of="actor", every=2)),
        "target": TrackingOptions(track=Tracking(of="actor", every=1, decay=0.75)),
    }
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=2, max_new_tokens=4)}

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "opponent", TinyLoss(), AboveTarget()),)
