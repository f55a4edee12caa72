"""The sign and the reference point of each completion, the credit of KTO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf_algos.pairs import sequence_logprobs
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.types import Credit

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.types import Batch, RewardOutput

__all__ = ["KTO"]


@dataclass(frozen=True)
class KTO:
    """+ for desirable and - for undesirable rows, and the point z they are compared with (Ethayarajh et al. 2024).

    Reads the data's label: true or a positive number is desirable. z is what log(pi / ref) of a completion is to be
    expected to be, never below 0. The paper estimates it on completions paired with other prompts, which costs another
    forward pass; here it comes from the batch itself, over all ranks.
    """

    desirable: float = 1.0
    """weight of desirable rows"""
    undesirable: float = 1.0
    """weight of undesirable rows; weight times number of rows should be about equal for both kinds"""
    z: Literal["other", "batch", "zero"] = "other"
    """mean log(pi / ref) of the other kind's rows, of all rows, or no reference point"""

    needs: ClassVar[frozenset[str]] = frozenset({"actor.logprobs_NT", "ref_logprobs_NT"})

    def __call__(self, rewards: RewardOutput, rollouts: Batch, extras: Mapping[str, Tensor]) -> Credit:
        good_N = torch.tensor([_is_desirable(label) for label in rollouts.labels])
        ratios_N = sequence_logprobs(extras["actor.logprobs_NT"] - extras["ref_logprobs_NT"], rollouts.mask_NT)
        sums = torch.stack([ratios_N[good_N].sum(), good_N.sum(), ratios_N[~good_N].sum(), (~good_N).sum()]).double()
        good_sum, good, bad_sum, bad = (rollouts.world.sum(sums) if rollouts.world is not None else sums).tolist()
        if not (good and bad) and rollouts.scalars.get("progress", 0.0) == 0.0:
            kind = "desirable" if good else "undesirable"
            raise UsageError(
                f"KTO needs desirable and undesirable rows, and the first batch has only {kind} ones: "
                "check --data.label-key (true or false), or raise --batch-size"
            )
        points = {
            "other": (bad_sum / max(bad, 1), good_sum / max(good, 1)),
            "batch": ((good_sum + bad_sum) / max(good + bad, 1),) * 2,
            "zero": (0.0, 0.0),
        }
        z_good, z_bad = (max(0.0, point) for point in points[self.z])
        weights_N = torch.where(good_N, self.desirable, -self.undesirable)
        z_N = torch.where(good_N, z_good, z_bad)
        mask_NT = rollouts.mask_NT
        metrics = {"kto/desirable": good / (good + bad), "kto/z": (good * z_good + bad * z_bad) / (good + bad)}
        return Credit(weights_N[:, None] * mask_NT, z_N[:, None] * mask_NT, metrics=metrics)


def _is_desirable(label: object) -> bool:
    """The label of a row as a judgement."""
    if isinstance(label, (bool, int, float)):
        return label > 0
    raise UsageError(f"KTO needs labels true or false (or numbers, positive being desirable), not {label!r}")
