"""`--reward sum`: several rewards, weighted and added up.

    rlhf-run grpo --reward sum --reward.parts "math where=boxed" "length target=200" --reward.weights 1 0.1

Each part is logged under its own name. From Python a part may be a function or a provider too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_core.config.provider_spec import make_from_spec
from rlhf_core.config.python_values import function_name
from rlhf_core.contract.options import INTERNAL
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import PRECISION, RewardOutput
from rlhf_core.errors import OptionError, options_under
from rlhf_core.lazy import torch
from rlhf_core.reward.func import Func
from rlhf_core.reward.output import to_reward_output

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext

__all__ = ["Sum"]


@dataclass(frozen=True)
class Sum(Reward):
    """Several rewards, weighted and added up; each is logged under its name, numbered where one comes twice."""

    parts: tuple[str | Callable[..., Any], ...]
    """rewards by name, each with its options, such as "length target=40"; from Python also functions and providers"""
    weights: tuple[float, ...] = ()
    """weights of the parts, in their order; all 1 by default"""
    path: str = field(default="", metadata=INTERNAL)
    """the option of another provider that holds the only part, for messages"""

    def check(self) -> None:
        """Make the parts, and let each report what it misses."""
        self._check_weights()
        for path, provider in self._providers():
            if provider.needs:
                raise OptionError(
                    "parts",
                    f": {type(provider).__qualname__} reads roles, which a part of reward sum cannot; choose it as "
                    "the only reward",
                )
            with options_under(path):
                provider.check()

    def open(self, context: OpenContext) -> SumEngine:
        """Open the parts."""
        self._check_weights()
        parts = []
        for name, (path, provider) in zip(_names(self.parts), self._providers(), strict=True):
            with options_under(path):
                parts.append(_Part(name, path, provider, context.open(provider, name)))
        return SumEngine(parts, self.weights or (1.0,) * len(parts))

    def _check_weights(self) -> None:
        if self.weights and len(self.weights) != len(self.parts):
            raise OptionError(
                "weights",
                f"has {len(self.weights)} numbers, but there are {len(self.parts)} parts; give one number per part",
            )

    def _providers(self) -> Iterator[tuple[str, Any]]:
        """Each part with the path of its options."""
        for number, part in enumerate(self.parts):
            path = self.path or f"parts[{number}]"
            if isinstance(part, str):
                yield path, make_from_spec("reward", part, path)
            else:
                yield path, part if isinstance(part, Reward) else Func(part)


class _Part(NamedTuple):
    """An open part."""

    name: str
    """name of the part in metrics"""
    path: str
    """path of the part's options"""
    provider: Reward
    engine: Any


class SumEngine:
    """Open rewards and their weights."""

    def __init__(self, parts: Sequence[_Part], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, weights

    def close(self) -> None:
        """Nothing to do: the run closes the parts."""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        weights, outputs = self.weights, []
        for part in self.parts:
            with options_under(part.path):
                outputs.append((part.name, to_reward_output(part.engine(rollouts), rollouts, part.provider)))
        metrics: dict[str, Tensor] = {}
        known: dict[str, Tensor] = {}
        for name, output in outputs:
            own = {name: output.rewards_N, **{f"{name}/{key}": value for key, value in output.metrics.items()}}
            metrics |= own
            if output.abstained_N is not None:
                known |= dict.fromkeys(own, output.answered_N)
        abstained_N = ~torch.stack([output.answered_N for _, output in outputs]).any(0)
        per_token = [
            weight * each.rewards_NT for weight, (_, each) in zip(weights, outputs) if each.rewards_NT is not None
        ]
        return RewardOutput(
            rewards_N=_add_tensors([weight * output.rewards_N for weight, (_, output) in zip(weights, outputs)]),
            rewards_NT=_add_tensors(per_token) if per_token else None,
            metrics=metrics,
            known=known,
            abstained_N=abstained_N if abstained_N.any() else None,
            precision=max(PRECISION, *(min(1.0, abs(w)) * each.precision for w, (_, each) in zip(weights, outputs))),
        )


def _names(parts: Sequence[str | Callable[..., Any]]) -> list[str]:
    """Return the metric name of each part: its reward or function, numbered if a name occurs several times."""
    names = [part.split()[0] if isinstance(part, str) else function_name(part) for part in parts]
    return [f"{name}.{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _add_tensors(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
