"""The base classes of providers that carry out a run and watch it: strategies, launchers, evaluators and observers.

`rlhf_core.contract.providers` has those that a run computes with, and defines capabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.contract.capability import replaceable
from rlhf_core.contract.engines import call_once
from rlhf_core.contract.provider import Provider

if TYPE_CHECKING:
    from torch import nn

    from rlhf_core.contract.memory import ModelSize, RoleMemory
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.roles import Placement, Trainable
    from rlhf_core.contract.run_view import RunView

__all__ = ["Evaluator", "Launcher", "Observer", "Strategy"]


@replaceable
class Strategy(Provider):
    """Turns a role's module (and optimizer options, None for a frozen role) into a `Trainable`.

    `build` makes the module when called, so that a strategy may build it inside its own context (sharded from the
    start, for example) or not at all.
    """

    @property
    def second_order(self) -> bool:
        """True if its trainables are `SecondOrderTrainable`: an optimizer can observe a step and evaluate it again."""
        return False

    @property
    def by_parameter(self) -> bool:
        """True if its trainables save states by parameter, and load what others that do have saved (`open_states`)."""
        return False

    @property
    def narrow(self) -> bool:
        """True if the module computes on weights in the role's dtype; False if autocast converts float32 weights."""
        return False

    @property
    def ranks_per_row(self) -> int:
        """Neighboring ranks that work on the same rows together; their trainables have the `data_world` of this number."""
        return 1

    def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
        """Return what each of `ranks` devices holds of a role, for `rlhf-run plan`.

        `whole` are the parts of a whole copy under strategy `torch`, with weights in the role's dtype under `narrow`. By
        default each device holds a whole copy.
        """
        return replace(whole, weights=0) if size.shares_base else whole

    def __call__(self, build: Callable[[], nn.Module], optim: OptimizerProvider | None, total_steps: int) -> Trainable:
        """Return the model under this strategy."""
        raise NotImplementedError


@replaceable
class Launcher(Provider):
    """Places the roles of a plan."""

    @property
    def engines_apart(self) -> bool:
        """True if rollout engines of every kind run in separate processes, with their own weights."""
        return False

    @property
    def brings_weights_midway(self) -> bool:
        """True if its separate engines get new weights in the middle of a call, where they take them (`--partial.midway`).

        Asked only under `engines_apart`.
        """
        return False

    @property
    def one_process(self) -> bool:
        """True if all roles are in the process of the loop, so that one may read another's logits."""
        return False

    def check_plan(self, plan: Plan) -> None:
        """Raise `UsageError` if the roles of a plan cannot be placed, as far as that is known before anything starts."""

    def __call__(self, plan: Plan) -> Placement:
        """Return the placed roles and the rollout engine."""
        raise NotImplementedError


@replaceable
class Evaluator(Provider):
    """Measures a policy. Metric names are logged as `eval/<name>`."""

    @property
    def needs(self) -> frozenset[str]:
        """Outputs of roles that it asks for, such as `ref_logprobs_NT`."""
        return frozenset()

    @property
    def opponents(self) -> frozenset[str]:
        """Roles that it samples in addition to the policy."""
        return frozenset()

    @property
    def samples(self) -> bool:
        """False if it samples nothing."""
        return True

    def __call__(self, run: RunView) -> Mapping[str, float]:
        """Return metrics by name."""
        metrics: Mapping[str, float] = call_once(self, run)
        return metrics


@replaceable
class Observer(Provider):
    """Watches a run that asks for it by name: trackers, alarms."""

    @property
    def all_ranks(self) -> bool:
        """True if it is made, and its object's hooks are called, in every process instead of the first one only."""
        return False

    def __call__(self, run: RunView) -> object:
        """Return an object with observer hooks, methods marked `@hookimpl`. Called when the roles are placed."""
        raise NotImplementedError
