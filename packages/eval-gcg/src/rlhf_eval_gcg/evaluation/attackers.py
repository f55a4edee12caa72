"""Distribute units of work over ranks, run them in turn, and keep their results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_core import ModelOptions, OptionError, RoleSpec
from rlhf_core.lazy import torch
from rlhf_core.util.activity import report
from rlhf_core.util.messages import progress
from rlhf_eval_gcg.attack import AttackPrompt, attack
from rlhf_eval_gcg.evaluation.store import Unit

if TYPE_CHECKING:
    from rlhf_core import RunView
    from rlhf_eval_gcg.attack import Attack, AttackResult, Goal
    from rlhf_eval_gcg.attack.reward_objective import Rewards
    from rlhf_eval_gcg.evaluation.options import GCGOptions
    from rlhf_eval_gcg.evaluation.store import AttackStore

__all__ = ["Attacker", "Models", "check_goals", "check_models", "make_units", "reading"]

AT_ONCE = 8
"""Goals and seeds that are attacked together on an accelerator, which waits for launches while it attacks one."""


@dataclass(frozen=True)
class Models:
    """The models of an attack, all with one tokenizer."""

    policy: Any
    """the attacked causal language model"""
    tokenizer: Any
    more: tuple[Any, ...] = ()
    """further models that a suffix must also work on"""
    draft: Any = None
    """the small model of schedule `probe`"""

    @classmethod
    def load(cls, role: Any, options: GCGOptions) -> Models:
        """Return the policy's model with those that the options name; `check_models` says what is wrong with these."""
        more = tuple(_load(name, role) for name in options.more_models)
        draft = _load(options.draft, role) if options.draft else None
        return cls(role.causal_lm, role.tokenizer, more, draft)


@dataclass(frozen=True)
class Attacker:
    """Makes this rank's attacks.

    Args:
        models: what is attacked, and what helps.
        options: of the attack.
        store: what was attacked before, and what will be.
        rewards: of answers, for objective `reward`.
        judge_suffix: let `rewards` read the suffix.
    """

    models: Models
    options: Attack
    store: AttackStore
    rewards: Rewards | None = None
    judge_suffix: bool = True

    def make(self, units: Sequence[Unit], run: RunView) -> list[tuple[Unit, list[AttackResult]]]:
        """Attack this rank's share of `units`, and return all ranks' results in the order of units; collective."""
        rank, size, together = run.world.rank, run.world.size, self.together
        mine, rounds = units[rank::size], -(-len(units[::size]) // together)
        made: list[tuple[Unit, list[AttackResult]]] = []
        for k in range(rounds):
            report("attacking", k, rounds)
            for unit, results in self._results(mine[k * together : (k + 1) * together]):
                made.append((unit, results))
                if run.leader:
                    progress.info(_line(len(made), len(mine), unit, results))
            run.world.barrier()  # no rank waits longer than one call of attacks lasts
        found = {unit.key: results for part in run.world.gather(made) for unit, results in part}
        return [(unit, found[unit.key]) for unit in units]

    @property
    def together(self) -> int:
        """Number of units that are attacked in one call: suffixes that transfer fill a batch alone."""
        if self.options.transfer:
            return 1
        on_cpu = next(self.models.policy.parameters()).device.type == "cpu"
        return self.options.goals_at_once or (1 if on_cpu else AT_ONCE)

    def _results(self, units: Sequence[Unit]) -> list[tuple[Unit, list[AttackResult]]]:
        """Return the results of units, attacking together those that the store does not know."""
        known = {unit.key: self.store.get(unit) for unit in units}
        left = [unit for unit in units if known[unit.key] is None]
        if left:
            known |= self._attack(left)
        return [(unit, known[unit.key] or []) for unit in units]

    def _attack(self, units: Sequence[Unit]) -> dict[str, list[AttackResult] | None]:
        goals = [replace(goal, origin="") for unit in units for goal in unit.goals]
        state_file = self.store.state_file(units)
        results = attack(  # wherever the goals' file is, the state is that of these goals
            self.models.policy,
            self.models.tokenizer,
            goals,
            self.options
            if len(units) == 1
            else replace(self.options, goals_at_once=len(goals) * self.options.restarts),
            seed=units[0].draw if len(units) == 1 else [unit.draw for unit in units],
            state_file=state_file,
            progress=lambda at: report("attacking", at.step, at.steps),
            draft=self.models.draft,
            rewards=self.rewards,
            judge_suffix=self.judge_suffix,
            more_models=self.models.more,
        )
        rest = iter(results)
        found = {unit.key: [next(rest) for _ in unit.goals] for unit in units}
        for unit in units:
            self.store.put(unit, found[unit.key])
        state_file.unlink(missing_ok=True)
        return dict(found)


def make_units(goals: Sequence[Goal], seeds: Sequence[int], transfer: bool) -> list[Unit]:
    """Return the attacks of an evaluation: one per seed and goal, or per seed where one suffix is for all goals."""
    if transfer:
        return [Unit(tuple(goals), seed) for seed in seeds]
    return [Unit((goal,), seed) for seed in seeds for goal in goals]


def check_goals(goals: Sequence[Goal], tokenizer: Any, options: Attack) -> None:
    """Place every goal in its chat, so that what is wrong with one is raised before the first is attacked.

    Raises:
        UsageError, DataError: as `AttackPrompt.build`.
    """
    for goal in goals:
        AttackPrompt.build(goal, tokenizer, options)


def check_models(role: Any, options: GCGOptions) -> None:
    """Read the tokenizers of further models, not their weights.

    Raises:
        UsageError: there is no such model.
        OptionError: one has a tokenizer other than the policy's.
    """
    from rlhf_core.models.loading.tokenizer import load_tokenizer

    named = [*(("more_models", name) for name in options.more_models), ("draft", options.draft)]
    for field, name in named:
        if name and load_tokenizer(name, ModelOptions(model=name)).get_vocab() != role.tokenizer.get_vocab():
            raise OptionError(
                field, f"{name}: its tokenizer differs from the policy's; name a model of the same family"
            )


@contextmanager
def reading(model: Any, dtype: Any) -> Iterator[None]:
    """Let `model` be in evaluation mode and compute in `dtype`, with gradients; put it back at the end."""
    device, training = next(model.parameters()).device.type, model.training
    with torch.enable_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def _load(name: str, role: Any) -> Any:
    """Return a frozen causal language model on the policy's device."""
    from rlhf_core.models.build import build_module

    module = build_module(RoleSpec("attacked", ModelOptions(model=name), frozenset({"logprobs_NT"})))
    return module.causal_lm.to(next(role.causal_lm.parameters()).device)


def _line(k: int, count: int, unit: Unit, results: Sequence[AttackResult]) -> str:
    losses = ", ".join(f"{result.initial_loss:.3f} to {result.loss:.3f}" for result in results[:1])
    return f"attack {k}/{count}  seed {unit.seed}  steps {results[0].steps}  loss {losses}"
