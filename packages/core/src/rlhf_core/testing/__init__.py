"""The authors' test kit: small data to call a provider with, and one check per kind that it keeps the contract.

    from rlhf_core.testing import check_reward

    def test_it_keeps_the_contract() -> None:
        check_reward(MyReward())

A check fails with a sentence that states what the contract requires. It does not know whether the numbers mean what you
want: compare those with a formula of your own. The kit is installed with core as a pytest plugin, so that the fixtures of
`rlhf_core.testing.fixtures` are there without an import. Nothing here imports torch before a check runs.
"""

from __future__ import annotations

from rlhf_core.testing.algorithms import check_algorithm
from rlhf_core.testing.commands import TinyIngredientContext, check_command, check_ingredient
from rlhf_core.testing.engines import (
    check_evaluator,
    check_launcher,
    check_observer,
    check_rollout,
)
from rlhf_core.testing.environments import check_environment
from rlhf_core.testing.functions import check_advantage, check_data, check_loss, check_reward
from rlhf_core.testing.memory import compare_memory
from rlhf_core.testing.optimizers import check_optimizer
from rlhf_core.testing.outputs import check_output
from rlhf_core.testing.providers import check_light, check_provider
from rlhf_core.testing.ranks import RankResult, run_ranks
from rlhf_core.testing.selection import check_filter, check_sampler
from rlhf_core.testing.strategies import check_strategy
from rlhf_core.testing.tiny import tiny_extras, tiny_outputs, tiny_rewards, tiny_rollouts, tiny_run

__all__ = [
    "RankResult",
    "TinyIngredientContext",
    "check_advantage",
    "check_algorithm",
    "check_command",
    "check_data",
    "check_environment",
    "check_evaluator",
    "check_filter",
    "check_ingredient",
    "check_launcher",
    "check_light",
    "check_loss",
    "check_observer",
    "check_optimizer",
    "check_output",
    "check_provider",
    "check_reward",
    "check_rollout",
    "check_sampler",
    "check_strategy",
    "compare_memory",
    "run_ranks",
    "tiny_extras",
    "tiny_outputs",
    "tiny_rewards",
    "tiny_rollouts",
    "tiny_run",
]
