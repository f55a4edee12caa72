"""Shared parts of evaluators that sample: completions on held-out prompts, and metrics by data source.

Seeds depend on the run's seed and the prompt alone, so evaluations at two steps differ by the policy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.run_view import RunView

__all__ = ["by_datasource", "mean_and_error", "policy", "sample_heldout"]


def policy(run: RunView, evaluator: str) -> str:
    """The role that is sampled."""
    for name in run.plan.sources:
        if name in run.plan.roles:
            return name
    raise UsageError(f"evaluator {evaluator} samples the policy, but this run has no rollout; remove the evaluator")


def sample_heldout(run: RunView, evaluator: str, prompts: int, n: int) -> Rollouts:
    """This rank's share of `n` completions for each of the first `prompts` held-out rows."""
    source = policy(run, evaluator)
    rows = run.heldout(prompts)
    mine = list(range(run.world.rank, len(rows), run.world.size))
    asked = run.encoder.prompts([rows[i] for i in mine], mine)
    return run.rollouts(source, asked, replace(run.config.sampling, n=n, seed=run.config.seed))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; the error is 0 for a single value, of which nothing is known."""
    values_P = torch.tensor(values, dtype=torch.float64)
    error = float(values_P.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
    return float(values_P.mean()), error


def by_datasource(name: str, values: Sequence[float], meta: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`name` and `name_se` over all values, and `name/<datasource>` where rows have one; nothing without a value."""
    if not values:
        return {}
    mean, error = mean_and_error(values)
    groups: dict[str, list[float]] = {}
    for value, each in zip(values, meta, strict=True):
        if "datasource" in each:
            groups.setdefault(str(each["datasource"]), []).append(value)
    split = {f"{name}/{source}": mean_and_error(some)[0] for source, some in sorted(groups.items())}
    return {name: mean, f"{name}_se": error, **split}
