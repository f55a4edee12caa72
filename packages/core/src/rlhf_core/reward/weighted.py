"""`--reward sum`: several rewards, weighted and added up.

    rlhf-run grpo --reward sum --reward.parts "math where=boxed" "length target=200" --reward.weights 1 0.1

Each part is logged under its own name. From Python, a few lines of `__call__` do the same with any objects.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import UsageError
from rlhf_core.layout import annotation_of, option_fields
from rlhf_core.near import near
from rlhf_core.reward.output import as_output
from rlhf_core.types import RewardOutput
from rlhf_core.values import from_words

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.types import Rollouts

__all__ = ["Sum"]


@dataclass(frozen=True)
class Sum:
    """Several rewards, weighted and added up; each is logged under its name."""

    parts: tuple[str, ...]
    """rewards by name, each with its options: "length target=40" """
    weights: tuple[float, ...] = ()
    """of the parts, in their order; all 1 where absent"""

    def check(self) -> None:
        """Make the parts, and let each say what it misses."""
        if self.weights and len(self.weights) != len(self.parts):
            raise UsageError(f"--reward.weights has {len(self.weights)} numbers for the {len(self.parts)} parts")
        for part in self.parts:
            provider = _built(part)
            if hasattr(provider, "check"):
                provider.check()

    def close(self) -> None:
        """Free what the parts hold."""
        for part in self.parts:
            provider = _built(part)
            if hasattr(provider, "close"):
                provider.close()

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        self.check()
        weights = self.weights or (1.0,) * len(self.parts)
        providers = [(part.split()[0], _built(part)) for part in self.parts]
        outputs = [(name, as_output(provider(rollouts), rollouts, provider)) for name, provider in providers]
        metrics: dict[str, Tensor] = {}
        for name, output in outputs:
            metrics |= {name: output.rewards_N, **{f"{name}/{key}": value for key, value in output.metrics.items()}}
        per_token = [
            weight * each.rewards_NT for weight, (_, each) in zip(weights, outputs) if each.rewards_NT is not None
        ]
        return RewardOutput(
            rewards_N=_added([weight * output.rewards_N for weight, (_, output) in zip(weights, outputs)]),
            rewards_NT=_added(per_token) if per_token else None,
            metrics=metrics,
        )


def _added(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


@cache
def _built(part: str) -> Callable[[Rollouts], Any]:
    """The provider that `NAME option=value …` describes; made once, so that a model in it is loaded once.

    Raises:
        UsageError: there is no such reward or option, or the value does not fit.
    """
    from rlhf_core.registry import default_registry

    name, *words = shlex.split(part)
    cls: Any = default_registry().resolve("reward", name)
    known = [field.name for field in option_fields(cls)]
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in known:
            raise UsageError(
                f"--reward.parts {part!r}: {name} has no option {key!r}{near(key, known)}; write option=value"
            )
        try:
            options[key] = from_words(annotation_of(cls, key), value.split(","))
        except ValueError:
            raise UsageError(f"--reward.parts {part!r}: {value!r} does not fit {key}") from None
    try:
        provider: Callable[[Rollouts], Any] = cls(**options)
    except TypeError as error:
        raise UsageError(f"--reward.parts {part!r}: {error}") from None
    return provider
