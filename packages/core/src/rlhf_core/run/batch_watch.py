"""Measure sampled batches when they are trained on: the age of their tokens, and how far the policy has moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.contract.staleness import largest_age
from rlhf_core.errors import ContractError
from rlhf_core.training.credit import STALE
from rlhf_core.training.old_logprobs import VERSIONS, ages_of, sample_ages

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.run.run import Run

__all__ = ["check_ages", "watch_batches"]


def watch_batches(run: Run, batches: Mapping[str, Batch]) -> None:
    """Log the age of sampled batches and their KL to the reference; the ranks add up both at the end of the step."""
    for name, batch in batches.items():
        if name in run.roles:
            tokens, ages, oldest = ages_of(batch, run.roles[name].version)
            run.meter.log_token_mean("rollout/staleness", ages, tokens)
            run.meter.log_largest("rollout/staleness_max", oldest)
        if run.state.kl is not None:
            run.state.kl.measure(name, batch, run.meter)
    if run.config.ahead:
        _log_sample_ages(run, batches)


def check_ages(run: Run, metrics: Mapping[str, float]) -> None:
    """Check the bound on staleness. Tokens that are masked for their age are in the batch, and are older.

    Raises:
        ContractError: a token is older than a run that samples ahead allows. The step is not saved.
    """
    most, oldest = largest_age(run.config), metrics.get("rollout/staleness_max", 0.0)
    if run.config.ahead and run.config.stale.policy != "mask" and oldest > most:
        raise ContractError(
            f"step {run.step} has a token that is {oldest:g} updates old, but this run allows at most {most}; "
            f"the rollout engine {run.config.names.get('rollout', '')!r} reports wrong versions, or did not load "
            "new weights"
        )


def _log_sample_ages(run: Run, batches: Mapping[str, Batch]) -> None:
    """Log the age of the oldest and newest token of completions, and how many updates apart they are."""
    for name, batch in batches.items():
        if name in run.roles and VERSIONS in batch:
            oldest_N, newest_N = sample_ages(batch, run.roles[name].version)
            run.meter.log_batch("rollout/staleness_oldest", oldest_N)
            run.meter.log_batch("rollout/staleness_newest", newest_N)
            run.meter.log_batch("rollout/span", oldest_N - newest_N)
            if STALE in batch:
                sampled = batch.mask_NT.sum()
                run.meter.log_token_mean("rollout/masked", float(batch[STALE].sum()), float(sampled))
