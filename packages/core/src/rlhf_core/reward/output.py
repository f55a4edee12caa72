"""Check what rewards return. Every reward passes this check, so a wrong one stops the run and never trains a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.results import PRECISION, RewardOutput
from rlhf_core.errors import ContractError, DataError, NotFiniteReward, advice, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.nonfinite import row_as_dict
from rlhf_core.training.rounding import level_groups

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch

__all__ = ["excerpt", "require_labels", "to_reward_output", "without_nan"]


LABEL_ADVICE = advice(f"pass {run_option('data.label_key')}", "choose data that has them")
"""Advice in errors about rows without labels."""


def to_reward_output(
    raw: RewardOutput | Tensor | Sequence[float | None], rollouts: Batch, provider: object, precision: float = PRECISION
) -> RewardOutput:
    """`raw` as a float32 `RewardOutput` on the CPU. Rewards of one prompt that are equal within their precision are made equal.

    A None in a list abstains. Where a reward abstains, its rewards and scores are set to 0.

    Args:
        raw: what the provider returned.
        rollouts: the completions.
        provider: the reward, for messages.
        precision: relative precision of what the reward was computed from.

    Raises:
        ContractError: wrong type or shape; names the provider and its distribution.
        NotFiniteReward: a number that is not finite; carries those samples, too.
    """
    N, T = len(rollouts), rollouts.tokens_NT.shape[1]
    output = _as_output(raw)
    precision = max(precision, _precision_of(output))
    answered_N = torch.ones(N, dtype=torch.bool)
    if output.abstained_N is not None:
        answered_N = _check_tensor(output.abstained_N, "abstained_N", (N,), rollouts, provider) == 0

    def checked(value: Any, name: str, *shape: int) -> Tensor:
        return _check_tensor(value, name, shape, rollouts, provider, answered_N)

    def levelled(values_N: Tensor) -> Tensor:
        level_N = values_N.clone()
        level_N[answered_N] = level_groups(values_N[answered_N], rollouts.group_N[answered_N], precision)
        return level_N

    optional: dict[str, Any] = {}
    if output.rewards_NT is not None:
        optional["rewards_NT"] = checked(output.rewards_NT, "rewards_NT", N, T)
    if output.scores_N is not None:
        optional["scores_N"] = levelled(checked(output.scores_N, "scores_N", N))
    if output.abstained_N is not None:
        optional["abstained_N"] = ~answered_N
    if not isinstance(output.metrics, Mapping):
        raise ContractError(f"{_provider_name(provider)} returned metrics that are not a mapping of names to N numbers")
    metrics = {name: checked(value, f"metric {name!r}", N) for name, value in output.metrics.items()}
    rewards_N = levelled(checked(output.rewards_N, "rewards_N", N))
    return replace(output, rewards_N=rewards_N, metrics=metrics, precision=precision, **optional)


def _as_output(raw: RewardOutput | Tensor | Sequence[float | None]) -> RewardOutput:
    """Return `raw` as an output, still unchecked: each None of a list is a 0 that abstains."""
    if isinstance(raw, RewardOutput):
        return raw
    if not isinstance(raw, (list, tuple)) or not any(value is None for value in raw):
        return RewardOutput(rewards_N=raw)  # type: ignore[arg-type]  # `_check_tensor` looks at it
    abstained_N = torch.tensor([value is None for value in raw])
    values: Any = [0.0 if value is None else value for value in raw]
    return RewardOutput(rewards_N=values, abstained_N=abstained_N)


def _precision_of(output: RewardOutput) -> float:
    """Return the relative precision of rewards: the provider's, or that of a narrow dtype they come in."""
    dtype = output.rewards_N.dtype if isinstance(output.rewards_N, torch.Tensor) else torch.float32
    narrow = dtype.is_floating_point and torch.finfo(dtype).eps > output.precision
    return torch.finfo(dtype).eps if narrow else output.precision


def _check_tensor(
    value: Any, name: str, shape: tuple[int, ...], rollouts: Batch, provider: object, answered_N: Tensor | None = None
) -> Tensor:
    """Return `value` as finite float32 of `shape`, 0 in rows that are not answered."""
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ContractError(f"{_provider_name(provider)} returned {name} that are not numbers: {error}") from None
    if tensor.shape != shape:
        raise ContractError(
            f"{_provider_name(provider)} returned {name} of shape {tuple(tensor.shape)} for {shape[0]} completions; "
            f"expected {tuple(shape)}"
        )
    if answered_N is not None and not answered_N.all():
        tensor = tensor.clone()
        tensor[~answered_N] = 0.0
    if not tensor.isfinite().all():
        row = int((~tensor.isfinite()).nonzero()[0, 0])
        value = tensor[row].flatten()[(~tensor[row].flatten().isfinite()).nonzero()[0, 0]].item()
        bad = (~tensor.isfinite()).view(len(tensor), -1).any(1).nonzero().flatten().tolist()
        samples = [
            {"reward": _provider_name(provider), name: tensor[i].tolist()} | row_as_dict(rollouts, i) for i in bad
        ]
        raise NotFiniteReward(
            f"{_provider_name(provider)} returned {name} = {value} for {excerpt(rollouts, row)}", samples
        )
    return tensor


def without_nan(raw: RewardOutput | Tensor | Sequence[float | None]) -> RewardOutput:
    """`raw` with 0 for what is not finite: of the same shape, for a step that will not be trained on."""

    def zeroed(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0)

    output = _as_output(raw)
    names = ("rewards_NT", "scores_N")
    optional: dict[str, Any] = {name: zeroed(v) for name in names if (v := getattr(output, name)) is not None}
    metrics = {name: zeroed(value) for name, value in output.metrics.items()}
    return replace(output, rewards_N=zeroed(output.rewards_N), metrics=metrics, **optional)


def require_labels(rollouts: Batch, reward: str) -> None:
    """Check that every sample has a label for the reward called `reward`.

    Raises:
        DataError: one has none; the message states which.
    """
    if None in rollouts.labels:
        row = rollouts.labels.index(None)
        raise DataError(f"reward {reward} needs labels: {LABEL_ADVICE}; there is none for {excerpt(rollouts, row)}")


def excerpt(rollouts: Batch, row: int) -> str:
    """One line that shows which sample `row` is."""

    def short(text: str) -> str:
        return repr(text if len(text) <= 60 else text[:57] + "…")

    return f"sample {row}, prompt {short(rollouts.prompts[row])}, completion {short(rollouts.texts[row])}"


def _provider_name(provider: object) -> str:
    """The provider and the distribution it came with."""
    kind = type(provider)
    package = kind.__module__.partition(".")[0]
    try:
        owner = distribution(package).name  # as with most packages, in editable installs too
    except PackageNotFoundError:
        owner = packages_distributions().get(package, [kind.__module__])[0]
    return f"reward {kind.__qualname__} ({owner})"
