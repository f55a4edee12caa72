"""Preference pairs: rows 2k and 2k + 1 of a batch are the chosen and the rejected completion of pair k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.types import Metric

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.types import Batch, Outputs

__all__ = ["log_ratios", "pair_metrics", "sequence_logprobs", "split"]


def split(values_N: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, (N / 2,) each."""
    return values_N[0::2], values_N[1::2]


def sequence_logprobs(logprobs_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log pi(completion | prompt): the sum over masked tokens (N,)."""
    return logprobs_NT.masked_fill(~mask_NT, 0.0).sum(1)


def log_ratios(outputs: Outputs, batch: Batch) -> Tensor:
    """log pi / pi_ref of whole completions (N,)."""
    return sequence_logprobs(outputs["logprobs_NT"] - batch["ref_logprobs_NT"], batch.mask_NT)


def pair_metrics(rewards_N: Tensor) -> Mapping[str, Metric]:
    """How the implicit (or modelled) rewards of chosen and rejected completions compare. A tie counts as half right."""
    chosen, rejected = split(rewards_N.detach())
    margin = chosen - rejected
    return {
        "accuracy": Metric.over((margin > 0).float() + 0.5 * (margin == 0)),
        "margin": Metric.over(margin),
        "chosen_reward": Metric.over(chosen),
        "rejected_reward": Metric.over(rejected),
    }
