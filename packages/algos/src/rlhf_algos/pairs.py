"""Preference pairs: rows 2k and 2k + 1 of a batch are the chosen and the rejected completion of pair k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.contract.results import Metric
from rlhf_core.contract.terms import PAIRS_ADVICE
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch
from rlhf_core.training.rounding import prefer_chosen

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["log_ratios", "mean_logprobs", "pair_metrics", "row_means", "sequence_logprobs", "split_pairs"]


def split_pairs(values_N: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, (N / 2,) each.

    Raises:
        UsageError: the rows are not pairs, because the data has no rejected completions.
    """
    if len(batch) % 2 or not torch.equal(batch.group_N[0::2], batch.group_N[1::2]):
        raise UsageError(
            f"this loss compares pairs, but the data has prompts without a rejected completion: {PAIRS_ADVICE}"
        )
    return values_N[0::2], values_N[1::2]


def sequence_logprobs(logprobs_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log pi(completion | prompt): the sum over masked tokens (N,)."""
    return logprobs_NT.masked_fill(~mask_NT, 0.0).sum(1)


def mean_logprobs(logprobs_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """log pi(completion | prompt) / length (N,)."""
    return row_means(logprobs_NT, mask_NT)


def row_means(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """The mean over masked tokens (N,): the number itself where a credit set it at every token of a row."""
    return sequence_logprobs(values_NT, mask_NT) / mask_NT.sum(1).clamp(min=1)


def log_ratios(outputs: Outputs, batch: Batch) -> Tensor:
    """log pi / pi_ref of whole completions (N,)."""
    return sequence_logprobs(outputs["logprobs_NT"] - batch["ref_logprobs_NT"], batch.mask_NT)


def pair_metrics(chosen: Tensor, rejected: Tensor) -> Mapping[str, Metric]:
    """Compare the implicit (or modeled) rewards of chosen and rejected completions. A tie within rounding counts as
    half right."""
    margin = (chosen - rejected).detach()
    return {
        "accuracy": Metric.over(prefer_chosen(chosen, rejected)),
        "margin": Metric.over(margin),
        "chosen_reward": Metric.over(chosen),
        "rejected_reward": Metric.over(rejected),
    }
