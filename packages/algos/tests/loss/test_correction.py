"""Importance weights for a sampler: bounds are inside, and the logged KL is the exact one by enumeration."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from rlhf_algos.correction import Correction
from rlhf_core.contract.batch import Batch
from rlhf_core.testing.batches import make_batch


def batch_of(sampler: list[float], old: list[float]) -> Batch:
    """One token per row, with probabilities."""
    logs = {name: torch.tensor(values).log()[:, None] for name, values in (("sampler", sampler), ("old", old))}
    batch = make_batch([1] * len(sampler))
    return batch.with_extras(sampler_logprobs_NT=logs["sampler"], old_logprobs_NT=logs["old"])


@pytest.mark.parametrize("gate", ["tv", "binary_kl"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_distance_of_nothing_is_within_the_bounds(level: Any, gate: Any) -> None:
    """An engine that agrees exactly must not lose its tokens to a lower bound of 0."""
    weights_NT, about = Correction(level, "mask", high=0.1, gate=gate).weights(batch_of([0.5, 0.25], [0.5, 0.25]))
    assert weights_NT.tolist() == [[1.0], [1.0]] and float(about["sampler_kept"].total) == 2


def test_a_ratio_at_a_bound_is_kept_and_one_beyond_it_is_not() -> None:
    sampler, old = [0.25, 0.5, 0.25, 0.5], [0.5, 0.25, 0.51, 0.24]
    weights_NT, about = Correction("token", "mask", low=0.5, high=2.0).weights(batch_of(sampler, old))
    assert weights_NT[:, 0].tolist() == [2.0, 0.5, 0.0, 0.0]
    assert float(about["sampler_kept"].total) == 2 and float(about["sampler_kept"].count) == 4


def test_the_logged_kl_is_that_of_the_sampler_to_the_trainer() -> None:
    """Tokens as often as the sampler draws them: the mean is KL(sampler || old) = 1/2 log 2 + 1/4 log 1/2."""
    _, about = Correction("token").weights(batch_of([0.5, 0.5, 0.25, 0.25], [0.25, 0.25, 0.5, 0.25]))
    kl = about["sampler_kl"]
    assert float(kl.total / kl.count) == pytest.approx(0.5 * log(2) + 0.25 * log(0.5)) == pytest.approx(0.25 * log(2))
