"""What a provider of each kind is called with, and what roles and trainables can do: the contract as types.

Providers are frozen dataclasses: fields are options, calling does the work. Any of them may have `check()`, called once
before a run starts anything heavy, which raises `UsageError` for what is missing. Shape letters are those of
`rlhf_core.contract.batch`, which also exports every name here. Nothing is imported but for typing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contract.batch import Batch, Example, Prompts, Rollouts
    from rlhf_core.contract.optimizers import OptimizerProvider
    from rlhf_core.contract.options import Sampling
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.results import Credit, LossTerms, Outputs, RewardOutput
    from rlhf_core.contract.roles import Placement, Role, Trainable
    from rlhf_core.contract.run_view import RunView
    from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = [
    "Advantage",
    "Algorithm",
    "Data",
    "Evaluator",
    "Launcher",
    "Loss",
    "Reward",
    "Rollout",
    "Strategy",
]


class Data(Protocol):
    """Reads rows. A sequence is shuffled and resumed by row number; any other iterable is read in order."""

    def __call__(self, split: str) -> Iterable[Example]:
        """The rows of a split (`train`, or `heldout` for evaluation). Raises `DataError` naming file and row."""
        ...


@runtime_checkable
class Rollout(Protocol):
    """Samples completions from a role. Heavy state is opened at the first call and freed by `close`.

    An engine whose log-probabilities are the trainer's own (the same weights and the same arithmetic) may say so with a class
    attribute `exact = True`; where the role computes in float32 they then serve as old log-probabilities, and no forward pass
    computes those.
    """

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """`sampling.n` completions per prompt, adjacent. `sampling.seed_for(uid, k)` seeds each one by itself."""
        ...

    def sync(self, role: Role) -> Mapping[str, float]:
        """Take the role's present weights (`role.weights()`). Called after every update; returns metrics."""
        ...

    def sleep(self) -> None:
        """Give device memory back until `wake`."""
        ...

    def wake(self) -> None:
        """Be ready to sample again."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Reward(Protocol):
    """Scores completions. May have `close()`."""

    def __call__(self, rollouts: Rollouts) -> RewardOutput | Tensor | Sequence[float]: ...


class Advantage(Protocol):
    """Assigns credit to tokens. Whatever couples the samples of a group happens here, on whole groups.

    It may have two attributes: `needs` names the extras it reads (see `contract.requirements`; `extras` holds them), and
    `raw_rewards = True` spares it a KL penalty in the reward. `rollouts.world` sums statistics over ranks.

    It may have a method `prepare(batch) -> Batch`: on rows of data, before anything is computed about them, it adds rows of its
    own, which `Credit.rows` leaves out again.
    """

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit | Tensor: ...


class Loss(Protocol):
    """An objective. Pure; differentiable only in `outputs`.

    It may have three attributes: `wants` names the outputs of the trained role it differentiates (`{"logprobs_NT"}` where
    absent), `needs` the extras it reads from the batch (none), and `rows_per_unit` adjacent rows (2 for pairs: chosen,
    rejected; else 1) are never split over micro-batches.

    A wanted output `"<role>.<name>_NT"` is a function of both roles' whole next-token distributions at every token: the loss's
    method `compare(logits, other_logits)`, float32 (m, V) each, to (m,) numbers. It runs on a few tokens at a time.
    """

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms: ...


class Algorithm(Protocol):
    """Composes terms.

    `defaults` names the providers it uses unless the user chooses others, by kind: exactly these kinds have flags.
    `roles` gives the roles' default options: exactly these roles have flags. A role exists in a run only if a term
    trains it, a source samples it, or something needs its output.
    """

    defaults: ClassVar[Mapping[str, str]]
    roles: ClassVar[Mapping[str, Any]]

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        """The terms. Raises `UsageError` for a combination that cannot work."""
        ...


class Strategy(Protocol):
    """Turns a role's module (and optimiser options, None for a frozen role) into a `Trainable`.

    `build` makes the module when called, so that a strategy may build it inside a context of its own (sharded from the
    start, say) or not at all.
    """

    def __call__(
        self, build: Callable[[], nn.Module], optim: OptimizerProvider | None, total_steps: int
    ) -> Trainable: ...


class Launcher(Protocol):
    """Places the roles of a plan."""

    def __call__(self, plan: Plan) -> Placement: ...


class Evaluator(Protocol):
    """Measures a policy. Metric names are logged as `eval/<name>`.

    It may have three attributes: `needs` (outputs of roles that it asks for, as in an advantage), `opponents` (roles that it
    samples), and `samples = False` if it samples nothing.
    """

    def __call__(self, run: RunView) -> Mapping[str, float]: ...
