"""Algorithms for rlhf-core: advantage estimators, losses, and the presets that compose them.

One file per estimator in `advantage`, per objective in `loss`, per preset in `algorithm`. The mathematics they share is
in `groups`, `returns`, `whitening`, `ratios` and `pairs`, as pure functions. Importing any of it imports no torch.

The functions listed here are public: `from rlhf_algos import gae`. Everything else is private and may change; providers are
found by name, such as `rlhf_core.Registry().resolve("loss", "clip")`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_algos.groups import (
        group_mean,
        group_sizes,
        group_std,
        leave_one_out,
        place_scores,
        rank_in_group,
        require_groups,
        split_rewards,
    )
    from rlhf_algos.one_pass import Mle, Omd, OmdCg, OmdMemoryless, load_estimator
    from rlhf_algos.pairs import log_ratios, mean_logprobs, pair_metrics, sequence_logprobs, split_pairs
    from rlhf_algos.ratios import bounded_log_ratio, ratio_metrics
    from rlhf_algos.returns import discounted_returns, gae, scan
    from rlhf_algos.selection.candidates import Candidates
    from rlhf_algos.selection.deployment import Deployment, SimulatedUser, round_regret
    from rlhf_algos.selection.pessimism import pessimistic_draws, pessimistic_normal
    from rlhf_algos.selection.selector import PairSelector
    from rlhf_algos.whitening import whiten

__all__ = [
    "Candidates",
    "Deployment",
    "Mle",
    "Omd",
    "OmdCg",
    "OmdMemoryless",
    "PairSelector",
    "SimulatedUser",
    "bounded_log_ratio",
    "discounted_returns",
    "gae",
    "group_mean",
    "group_sizes",
    "group_std",
    "leave_one_out",
    "load_estimator",
    "log_ratios",
    "mean_logprobs",
    "pair_metrics",
    "pessimistic_draws",
    "pessimistic_normal",
    "place_scores",
    "rank_in_group",
    "ratio_metrics",
    "require_groups",
    "round_regret",
    "scan",
    "sequence_logprobs",
    "split_pairs",
    "split_rewards",
    "whiten",
]

_HOMES = {
    "groups": (
        "group_mean group_sizes group_std leave_one_out place_scores rank_in_group require_groups split_rewards"
    ),
    "one_pass": "Mle Omd OmdCg OmdMemoryless load_estimator",
    "pairs": "log_ratios mean_logprobs pair_metrics sequence_logprobs split_pairs",
    "ratios": "bounded_log_ratio ratio_metrics",
    "returns": "discounted_returns gae scan",
    "selection.candidates": "Candidates",
    "selection.deployment": "Deployment SimulatedUser round_regret",
    "selection.pessimism": "pessimistic_draws pessimistic_normal",
    "selection.selector": "PairSelector",
    "whitening": "whiten",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"rlhf_algos.{module}"), name)
    raise AttributeError(f"module 'rlhf_algos' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
