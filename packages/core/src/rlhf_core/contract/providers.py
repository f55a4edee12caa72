"""The base classes of providers: how each is called, and every capability that core reads, with its default.

A provider is a frozen dataclass that subclasses its kind's base: fields are its options, and calling it does the work.

    @dataclass(frozen=True)
    class Brevity(Reward):
        limit: int = 40
        def __call__(self, rollouts): ...

Each property here is a capability. A provider declares another value by a class attribute, such as `min_samples = 2`, a
property, or where it is an option of users, a field. Shape letters: `rlhf_core.contract.batch`. No base has fields.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.contract.capability import replaceable
from rlhf_core.contract.engines import call_once
from rlhf_core.contract.provider import Provider
from rlhf_core.contract.run_providers import Evaluator, Launcher, Observer, Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch, Example, Prompts, Rollouts
    from rlhf_core.contract.episode import Session
    from rlhf_core.contract.memory import ModelSize, SamplingLoad
    from rlhf_core.contract.options import KL, ModelOptions, Sampling
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.results import Credit, LossTerms, Outputs, RewardOutput
    from rlhf_core.contract.roles import Role
    from rlhf_core.contract.run_view import RowEncoder
    from rlhf_core.contract.terms import ProviderChoices, Term

__all__ = [
    "BASES",
    "Advantage",
    "Algorithm",
    "Data",
    "Environment",
    "Evaluator",
    "Launcher",
    "Loss",
    "Observer",
    "Provider",
    "Reward",
    "Rollout",
    "Strategy",
]


@replaceable
class Data(Provider):
    """Reads rows. A sequence is shuffled and resumed by row number; any other iterable is read in order."""

    @property
    def runs_ahead(self) -> bool:
        """True if rows may be read in the background, because no row draws from a global random generator.

        Otherwise each row of anything but a list is read in the loop, after `random`, numpy and torch are seeded for it.
        """
        return False

    @property
    def shuffle_buffer(self) -> int:
        """Rows of a stream that are held and drawn from by chance; 0 reads it in order."""
        return 0

    @property
    def holds_out(self) -> bool:
        """True if its options keep rows from training, so that offline algorithms measure their loss on them."""
        return False

    def __call__(self, split: str) -> Iterable[Example]:
        """Return the rows of a split (`train`, or `heldout` for evaluation). Raises `DataError` naming file and row."""
        raise NotImplementedError


@replaceable
class Rollout(Provider):
    """Samples completions from a role. The engine that it opens has all of these methods."""

    @property
    def exact(self) -> bool:
        """True if sampler log-probabilities are the trainer's own: the same weights and the same arithmetic.

        Where the role computes in float32 they then serve as old log-probabilities, and no forward pass computes those.
        """
        return False

    @property
    def min_p_first(self) -> bool:
        """True if min-p is taken before top-p, which is then a share of what min-p left. Core takes it after top-p.

        Where an engine returns no kept sets, the trainer cuts its own distribution in the engine's order.
        """
        return False

    @property
    def has_own_weights(self) -> bool:
        """True if it has its own weights and can sample in a thread while the role trains, as `--ahead` does.

        It is called and takes weights by one thread at a time. Under a launcher with `engines_apart` every engine may.
        """
        return False

    @property
    def takes_weights_midway(self) -> bool:
        """True if another thread may call `sync` during a call, as `--partial.midway` does.

        Completions in progress then continue under the new weights, and `versions_NT` has the version of each token. An engine
        that samples from the role's own module calls `Role.refresh` before each forward pass.
        """
        return False

    @property
    def devices(self) -> int:
        """Number of GPUs that one engine computes on, where there are any: several under tensor or pipeline parallelism."""
        return 1

    @property
    def single_engine(self) -> bool:
        """True if a run has one engine, however many workers a role has: several would bring weights to the same servers."""
        return False

    @property
    def weight_dtype(self) -> str:
        """Type in which it holds the matrices of a role, such as `float16`; empty if it is the role's compute dtype.

        A launcher may send matrices in it. Vectors keep their precision: some are held in float32 everywhere.
        """
        return ""

    def check_plan(self, plan: Plan) -> None:
        """Raise `UsageError` if it cannot sample the roles of a plan, as far as that is known before anything starts."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        """Return `sampling.n` completions per prompt, adjacent. `sampling.seed_for(uid, k)` seeds each one separately."""
        raise NotImplementedError

    def sync(self, role: Role) -> Mapping[str, float]:
        """Take the role's present weights (`role.weights()`). Called after every update; returns metrics."""
        return {}

    def sleep(self, level: Literal[1, 2] = 1) -> int:
        """Give device memory back until `wake`; return its bytes. Level 2 drops weights, which come with the next `sync`.

        Level 1 keeps them in host memory. An engine that is called after level 2 without a `sync` takes the weights itself.
        """
        return 0

    def wake(self, part: Literal["weights", "cache", "all"] = "all") -> int:
        """Take the memory of a part again; return its bytes. `sync` needs the weights alone, a call needs all."""
        return 0

    def memory(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return its bytes on the role's device while it samples, weights of its own included, for `rlhf-run plan`."""
        return 0

    def kept_memory(self, size: ModelSize, load: SamplingLoad) -> int:
        """Return the part of `memory` that it holds between calls, too: all of it unless it is `exact`."""
        return 0 if self.exact else self.memory(size, load)

    def session(self, role: Role) -> AbstractContextManager[Callable[[Prompts, Sampling], Rollouts]]:
        """Return a context manager around all turns of a batch of episodes; its value is called to sample `role`.

        All ranks take part in opening it, in the first turn (without prompts, of one token that is dropped) and in closing it.
        The number of later turns differs, so they must not be collective: an engine gathers sharded weights as it opens.
        """
        return nullcontext(partial(self, role))


@replaceable
class Environment(Provider):
    """Answers a policy between its turns. State is in the sessions; see `rlhf_core.contract.episode`."""

    @property
    def drives(self) -> bool:
        """True if its sessions drive: core calls their `drive`, and never `respond`."""
        return False

    @property
    def messages(self) -> bool:
        """True if feedback has chat messages; the chat template is then checked before models are loaded."""
        return False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the numbers in `Feedback.metrics`."""
        return ()

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn, in addition to `--sampling.stop`; they stay in it."""
        return ()

    def __call__(self, example: Example, seed: int) -> Session | Awaitable[Session]:
        """Begin an episode on a row of data. The completions of a prompt have one seed, so that their rewards compare."""
        raise NotImplementedError


@replaceable
class Reward(Provider):
    """Scores completions."""

    roles: ClassVar[Mapping[str, ModelOptions]] = {}
    """default options of roles that it brings, in addition to the algorithm's: a reward model, a judge"""

    @property
    def needs(self) -> frozenset[str]:
        """Outputs of roles that it reads, such as `judge.scores_N`: `rollouts["judge.scores_N"]` when it is called."""
        return frozenset()

    @property
    def reads_texts(self) -> bool:
        """True if its roles read rows that `role_rows` makes, with their own tokenizers; else they read the sampled tokens."""
        return False

    def role_rows(self, role: str, rollouts: Batch, encoder: RowEncoder) -> Batch:
        """Return what `role` reads about each completion, one row each, encoded by its own `encoder`."""
        raise NotImplementedError

    def __call__(self, rollouts: Rollouts) -> RewardOutput | Tensor | Sequence[float | None]:
        """Return one number per completion (N,), or a `RewardOutput`. None abstains from a completion: it leaves its group."""
        output: RewardOutput | Tensor | Sequence[float | None] = call_once(self, rollouts)
        return output


@replaceable
class Advantage(Provider):
    """Assigns credit to tokens. Whatever couples the samples of a group happens here, on whole groups.

    `rollouts.world` sums statistics over ranks.
    """

    roles: ClassVar[Mapping[str, ModelOptions]] = {}
    """default options of roles that it brings, in addition to the algorithm's"""

    @property
    def needs(self) -> frozenset[str]:
        """Extras that it reads, such as `values_NT`; see `rlhf_core.contract.requirements`."""
        return frozenset()

    @property
    def min_samples(self) -> int:
        """Completions per prompt that it compares at least."""
        return 1

    @property
    def raw_rewards(self) -> bool:
        """True if the KL penalty is never subtracted from its rewards."""
        return False

    @property
    def selects(self) -> str:
        """Rows that its `Credit.rows` leaves: `pairs` (chosen, rejected), `rows` (some of them), or empty for all."""
        return ""

    @property
    def joins(self) -> str:
        """A second source. For each prompt, its rows follow those of the term's source; `joined_N` is 1 for them."""
        return ""

    def prepare(self, batch: Batch) -> Batch:
        """Add its own rows to rows of data, before anything is computed about them; `Credit.rows` leaves them out again."""
        return batch

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit | Tensor:
        """Return the credit of each token, (N, T)."""
        credit: Credit | Tensor = call_once(self, rewards, rollouts, extras)
        return credit


@replaceable
class Loss(Provider):
    """An objective. `__call__` is pure, and differentiable only in its argument `outputs`.

    The property `outputs` names the tensors that the argument `outputs` holds. It may also name a comparison with another role,
    `"<role>.<name>_NT"`, with any `<name>`. Core then calls `compare(logits, other_logits)` on m tokens at a time, with the
    float32 logits (m, V) of the trained role and of `<role>`. The (m,) results, joined, are that output.
    """

    roles: ClassVar[Mapping[str, ModelOptions]] = {}
    """default options of roles that it brings, in addition to the algorithm's"""

    @property
    def outputs(self) -> frozenset[str]:
        """Outputs of the trained role that it differentiates."""
        return frozenset({"logprobs_NT"})

    @property
    def needs(self) -> frozenset[str]:
        """Extras that it reads from the batch, such as `old_logprobs_NT`."""
        return frozenset()

    @property
    def rows_per_unit(self) -> int:
        """Adjacent rows that are never split over micro-batches: 2 for pairs (chosen, rejected)."""
        return 1

    @property
    def aggregate(self) -> str | None:
        """Name of the average over its values (`Reduction.per`); None if the loss has no option `aggregate`."""
        return None

    @property
    def length(self) -> int | None:
        """Divisor of `aggregate constant` in tokens; 0 takes the limit of sampling. None if it has no option `length`."""
        return None

    @property
    def corrects(self) -> bool:
        """True if it multiplies each token by the ratio of old to sampler probabilities.

        `old_logprobs_NT` may then be computed by a newer version of the model than the one that sampled.
        """
        return False

    def with_correction(self) -> Loss:
        """Return a copy that corrects, by importance ratios, for tokens sampled by an older version of the model.

        A loss without such a correction, or with it switched on, returns itself.
        """
        return self

    def compare(self, logits: Tensor, other_logits: Tensor) -> Tensor:
        """Return one number per token (m,) of two roles' logits (m, V); for outputs `"<role>.<name>_NT"` only."""
        raise NotImplementedError

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        """Return the values of the objective and the reduction they ask for."""
        raise NotImplementedError


@replaceable
class Algorithm(Provider):
    """Composes terms. A role exists in a run only if a term trains it, a source samples it, or something needs its output."""

    defaults: ClassVar[Mapping[str, str]] = {}
    """names of the providers that it uses unless the user chooses others, by kind: exactly these kinds have flags"""
    roles: ClassVar[Mapping[str, ModelOptions]] = {}
    """default options of its roles: exactly these roles have flags"""
    config_defaults: ClassVar[Mapping[str, Any]] = {}
    """core's own options (fields of `RunConfig`) that have another default under this algorithm"""
    policy: ClassVar[str] = "actor"
    """the trained role that OUTPUT/model is; the data's tokenizer is its own, and its metrics have no role's name in front"""

    @property
    def kl(self) -> KL | None:
        """The penalty that keeps the policy near the reference."""
        return None

    @property
    def shaping(self) -> Any:
        """A `RewardShaping`: scale and penalties of rewards."""
        return None

    @property
    def dynamic(self) -> Any:
        """A `DynamicSampling`: how prompts that a filter rejects are replaced."""
        return None

    @property
    def samples(self) -> tuple[str, ...]:
        """Roles that are sampled though no term trains on their samples."""
        return ()

    @property
    def exports(self) -> tuple[str, ...]:
        """Roles that are written to OUTPUT/<role> at the end, in addition to the policy."""
        return ()

    @property
    def cache(self) -> str:
        """Folder where the outputs of frozen roles on rows of data are kept for later runs; empty keeps none."""
        return ""

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        """Return the terms. Raises `UsageError` for a combination that cannot work."""
        raise NotImplementedError


BASES: Mapping[str, type[Provider]] = {
    "data": Data,
    "rollout": Rollout,
    "environment": Environment,
    "reward": Reward,
    "advantage": Advantage,
    "loss": Loss,
    "algorithm": Algorithm,
    "strategy": Strategy,
    "launcher": Launcher,
    "evaluator": Evaluator,
    "observer": Observer,
}
"""The base class of each kind; the other kinds have protocols (`contract/`)."""
