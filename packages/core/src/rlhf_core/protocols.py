"""What a provider of each kind is called with, and what roles and trainables can do: the contract as types.

Providers are frozen dataclasses: fields are options, calling does the work. Any of them may have `check()`, called once
before a run starts anything heavy, which raises `UsageError` for what is missing. Shape letters are those of
`rlhf_core.types`, which also exports every name here. Nothing is imported but for typing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.options import Optim, Sampling
    from rlhf_core.plan import Plan, RoleSpec
    from rlhf_core.run import Run
    from rlhf_core.types import (
        Batch,
        Chosen,
        Credit,
        Example,
        LossTerms,
        Outputs,
        Placed,
        Prompts,
        RewardOutput,
        Rollouts,
        Term,
    )
    from rlhf_core.world import World

__all__ = [
    "Advantage",
    "Algorithm",
    "Data",
    "Evaluator",
    "Launcher",
    "Loss",
    "Reward",
    "Role",
    "Rollout",
    "Strategy",
    "Trainable",
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

    It may have two attributes: `needs` names the extras it reads (see `rlhf_core.needs`; `extras` holds them), and
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

    def __call__(self, chosen: Chosen) -> tuple[Term, ...]:
        """The terms. Raises `UsageError` for a combination that cannot work."""
        ...


class Trainable(Protocol):
    """A model under a strategy, inside one process (one rank of `world`).

    It may have more methods, which options ask for:

    * `lend() -> Trainable` (`--<role>.lora.rank`): the model without its adapters, as a frozen role; see `strategy.lent`. Where
      it is missing, that role loads the model again.
    * `snapshot() -> Callable[[str], None]` (`--save-async`): copies what `save` would write, and returns what writes the copy
      to a folder. Every rank takes the snapshot; only the first writes it, in another thread while training goes on, and
      before the next snapshot is taken.
    * `discard()` (`--on-nonfinite skip`, `--on-oom halve`): forgets the gradients since the last step. Where it exists, `step`
      leaves weights, optimiser and schedule as they are if the gradient is not finite.
    """

    world: World
    module: nn.Module

    def forward(self, batch: Batch, wants: frozenset[str]) -> dict[str, Tensor]:
        """The wanted outputs for the rows of `batch`, with gradient unless called under `torch.no_grad`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. Gradients are summed over micro-batches and over the ranks of `world`."""
        ...

    def step(self) -> Mapping[str, float]:
        """Clip, update, zero the gradients, advance the schedule; returns `grad_norm` and `lr`.

        A gradient that is not finite must not reach the weights: its norm is returned, and the run stops unless the role
        computes in float16, whose loss scaling overflows now and then and adapts.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names, gathered if sharded."""
        ...

    def gathered(self, part: nn.Module | None = None) -> AbstractContextManager[None]:
        """While it is open, `part` (all of `module` where absent) holds full weights and each rank may use it by itself."""
        ...

    def save(self, folder: str) -> None:
        """Write model, optimiser and schedule state for `load`; every rank calls it."""
        ...

    def load(self, folder: str) -> None:
        """Restore what `save` wrote."""
        ...

    def offload(self) -> None:
        """Move all states out of device memory until `reload`."""
        ...

    def reload(self) -> None:
        """Bring them back."""
        ...


class Strategy(Protocol):
    """Turns a role's module (and optimiser options, None for a frozen role) into a `Trainable`.

    `build` makes the module when called, so that a strategy may build it inside a context of its own (sharded from the
    start, say) or not at all.
    """

    def __call__(self, build: Callable[[], nn.Module], optim: Optim | None, total_steps: int) -> Trainable: ...


class Role(Protocol):
    """A named model with a purpose: what the loop and the rollout engines see, local or remote."""

    name: str
    spec: RoleSpec
    version: int

    def infer(self, batch: Batch, wants: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """The wanted outputs of all rows: eval mode, no gradient, on the CPU.

        `source` is said if the role is about to be trained on this very batch, which came from there: one that can keep
        the pass for that need not make it again.
        """
        ...

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        """One pass of optimiser steps over the credited batches, keyed as `Plan.credits`; returns metrics."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names."""
        ...

    def save(self, folder: str) -> None:
        """Checkpoint state."""
        ...

    def load(self, folder: str) -> None:
        """Restore checkpoint state."""
        ...

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder."""
        ...


class Launcher(Protocol):
    """Places the roles of a plan."""

    def __call__(self, plan: Plan) -> Placed: ...


class Evaluator(Protocol):
    """Measures a policy. Metric names are logged as `eval/<name>`.

    It may have three attributes: `needs` (outputs of roles that it asks for, as in an advantage), `opponents` (roles that it
    samples), and `samples = False` if it samples nothing.
    """

    def __call__(self, run: Run) -> Mapping[str, float]: ...
