"""Measure sampled batches when they are trained on: the age of their tokens, and how far the policy has moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.contract.staleness import largest_age
from rlhf_core.errors import ContractError
from rlhf_core.training.credit import STALE
from rlhf_core.training.old_logprobs import VERSIONS, ages_of, sample_ages, staleness

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.run.run import Run

__all__ = ["watch_batches"]


def watch_batches(run: Run, batches: Mapping[str, Batch]) -> None:
    """Log the age of sampled batches and the KL to the reference, which an adaptive coefficient follows.

    Raises:
        ContractError: a token is older than a run that samples ahead allows.
    """
    kl = run.state.kl
    mine = [ages_of(batch, run.roles[name].version) for name, batch in batches.items() if name in run.roles]
    measured = [kl.measure(batch) for batch in batches.values()] if kl is not None else []
    everyone = run.world.gather((mine, measured)) if mine or measured else []
    ages = [staleness(parts) for parts in zip(*(each for each, _ in everyone))]
    if ages:
        means, oldest = zip(*ages, strict=True)
        run.log({"rollout/staleness": sum(means) / len(ages), "rollout/staleness_max": max(oldest)})
        _check_ages(run, max(oldest))
    if run.config.ahead:
        _log_sample_ages(run, batches)
    for source, parts in zip(batches if kl is not None else (), zip(*(each for _, each in everyone))):
        run.log(kl.watch(source, parts) if kl is not None else {})


def _check_ages(run: Run, oldest: float) -> None:
    """Check the bound on staleness. Tokens that are masked for their age are in the batch, and are older."""
    most = largest_age(run.config)
    if run.config.ahead and run.config.stale.policy != "mask" and oldest > most:
        raise ContractError(
            f"step {run.step + 1} has a token that is {oldest:g} updates old, but this run allows at most {most}; "
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
