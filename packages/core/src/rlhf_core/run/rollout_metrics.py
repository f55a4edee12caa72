"""Metrics of a run: sampled completions and their rewards, and the time, speed and memory of a step.

The meaning of each metric is in `rlhf_core.plugins.metric_catalogue`; docs/metrics.md is made from it.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_core.errors import ContractError, UsageError
from rlhf_core.lazy import torch
from rlhf_core.training.shared_forward import group_same_rows

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.results import RewardOutput
    from rlhf_core.training.step_metrics import Meter

__all__ = ["add_measured", "log_completions", "log_rewards", "measure_step", "trained_tokens"]

GIB = 2.0**30


def log_completions(meter: Meter, prefix: str, rollouts: Rollouts, sampling: Sampling) -> None:
    """Log what was sampled.

    The entropy costs no forward pass: -log p of a sampled token is an unbiased estimate of its distribution's entropy.
    """
    meter.log_batch(f"{prefix}/length", rollouts.lengths_N.float())
    meter.log_batch(f"{prefix}/truncated", torch.tensor([float(f != "stop") for f in rollouts.finish]))
    if "turns_N" in rollouts:
        meter.log_batch(f"{prefix}/turns", rollouts["turns_N"].float())
        meter.log_batch(f"{prefix}/failed", rollouts["environment_failed_N"].float())
        meter.log_batch(f"{prefix}/feedback", (rollouts.lengths_N - rollouts.mask_NT.sum(1)).float())
    if "segments_N" in rollouts:
        meter.log_batch(f"{prefix}/segments", rollouts["segments_N"].float())
    if sampling.temperature > 0:
        surprise = -float(rollouts["sampler_logprobs_NT"][rollouts.mask_NT].double().sum())
        meter.log_token_mean(f"{prefix}/entropy", surprise, float(rollouts.mask_NT.sum()))
    if "kept_mass" in rollouts.scalars:
        tokens = float(rollouts.mask_NT.sum())
        meter.log_token_mean("rollout/kept_mass", rollouts.scalars["kept_mass"] * tokens, tokens)


def log_rewards(meter: Meter, prefix: str, rewards: RewardOutput, rollouts: Batch) -> None:
    """Log what completions earned."""
    whole_N = rewards.total_N
    meter.log_batch(f"{prefix}/mean", whole_N)
    meter.log_variance(f"{prefix}/variance", whole_N)
    meter.log_sources(f"{prefix}/mean", whole_N, rollouts.meta)
    for name, values_N in rewards.metrics.items():
        known_N = rewards.known.get(name)
        meter.log_batch(f"{prefix}/{name}", values_N if known_N is None else values_N[known_N])


def trained_tokens(credited: Mapping[str, Batch]) -> float:
    """Return the tokens of this rank's rows in training, prompts included; rows that several credits share count once."""
    distinct = [credited[keys[0]] for keys in group_same_rows(credited)]
    return sum(float((batch.prompt_lengths_N + batch.lengths_N).sum()) for batch in distinct)


def add_measured(metrics: dict[str, float], measured: object, evaluator: str) -> None:
    """Add what an evaluator measured, as `eval/<name>`.

    Raises:
        ContractError: it measured something other than numbers by name.
        UsageError: another one has measured the same.
    """
    for name, value in _measured_values(evaluator, measured).items():
        if f"eval/{name}" in metrics:
            raise UsageError(
                f"evaluator {evaluator} measures eval/{name}, as another evaluator does; remove one of them"
            )
        metrics[f"eval/{name}"] = value


def _measured_values(evaluator: str, measured: object) -> dict[str, float]:
    """Return the metrics of an evaluator as numbers.

    Raises:
        ContractError: it returned no mapping, or a value that is not one number.
    """
    if not isinstance(measured, Mapping):
        raise ContractError(
            f"evaluator {evaluator} returned {reprlib.repr(measured)}; return numbers by name, {{}} for none"
        )
    numbers: dict[str, float] = {}
    for name, value in measured.items():
        try:
            plain = value.item() if hasattr(value, "item") else value  # tensors, arrays and numbers of numpy
        except (RuntimeError, ValueError):  # of several elements
            plain = None
        if not isinstance(plain, (int, float)):
            raise ContractError(
                f"evaluator {evaluator}: the metric {name!r} must be one number, not {reprlib.repr(value)}"
            )
        numbers[str(name)] = plain
    return numbers


def measure_step(seconds: float) -> dict[str, float]:
    """Return time and memory of a step of this process."""
    return {"time/step": seconds, "memory/process": peak_rss() / GIB} | _device_memory()


def peak_rss() -> float:
    """The most memory that this process has held so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB


def _device_memory() -> dict[str, float]:
    """The most memory that tensors held on this process's device since the step before, if it has one."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"memory/device": peak / GIB}
