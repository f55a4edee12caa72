"""A plan: what a configuration means, as plain data that is the same in every process. `training.planner` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from rlhf_core.contract.options import KL, ModelOptions, RunConfig, Tracking, TrackingOptions, TrainedOptions
from rlhf_core.contract.outputs import Output
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.requirements import LANGUAGE, Need
from rlhf_core.contract.terms import Term, update_order

__all__ = ["CREDIT", "DATA", "CreditSpec", "Plan", "RoleSpec"]

DATA = "data"
"""The source that is not a role."""

CREDIT = ("advantages_NT", "returns_NT")
"""Names that only an advantage provides."""


@dataclass(frozen=True)
class CreditSpec:
    """One (source, advantage): computed once per step, shared by the terms that use it."""

    key: str
    """`<source>` or `<source>#<k>`: names the credited batch"""
    source: str
    advantage: Advantage | None
    needs: tuple[Need, ...] = ()
    """inputs that must be in the batch before credit and losses run"""
    every: int = 1
    """steps between two in which its terms take part"""
    after: str = ""
    """the role whose update comes first (`Term.after`)"""
    parts: tuple[str, ...] = ()
    """the two sources whose rows `source` has, where an advantage joins another one (`Advantage.joins`)"""


@dataclass(frozen=True)
class RoleSpec:
    """One role of the run."""

    name: str
    options: ModelOptions
    outputs: frozenset[str]
    """every output that some term or need asks of it; decides which heads it has"""
    terms: tuple[tuple[str, Term], ...] = ()
    """(credit key, term) for each term that trains it; empty for a frozen role"""
    sampled: bool = False
    """True if a source or an evaluator samples it"""
    reads: bool = True
    """True if it gets the same token ids as the others; one that only answers an evaluator can have another vocabulary"""
    temperature: float = 1.0
    """divisor of its logits: the sampling temperature of an online run, so that training uses the sampled
    distribution"""
    providers: Mapping[str, Output] = field(default_factory=dict)
    """plugins' `outputs` by name"""
    ends: tuple[int, ...] = ()
    """ids of the tokens that end a completion, found when the run starts; empty for a role that reads other token ids, whose
    own they are (`end_ids`)"""
    template: str = ""
    """the chat template that rows were read with in place of the tokenizer's (`Encoding.template_file`), saved with the model;
    empty where the tokenizer's own is"""

    @property
    def trained(self) -> bool:
        """Return True if a term trains the role."""
        return bool(self.terms)

    @property
    def tracking(self) -> Tracking | None:
        """Return how the weights track another role's; None if they do not."""
        options = self.options
        return options.track if isinstance(options, TrackingOptions) and options.track.of else None

    @property
    def needs_language_head(self) -> bool:
        """True if it is sampled, or some output reads the language-model head."""
        return self.sampled or bool(self.outputs & LANGUAGE) or any(each.language for each in self.providers.values())


@dataclass(frozen=True)
class Plan:
    """A run, worked out."""

    config: RunConfig
    terms: tuple[Term, ...]
    sources: tuple[str, ...]
    """distinct sources, in the order of their terms"""
    credits: Mapping[str, CreditSpec]
    roles: Mapping[str, RoleSpec]
    policy: str
    """the role that OUTPUT/model is (`Algorithm.policy`)"""
    exports: tuple[str, ...] = ()
    """roles that are written to OUTPUT/<role> in addition"""
    reward_needs: tuple[Need, ...] = ()
    """outputs of roles that the reward reads"""
    kl: KL | None = field(default=None)
    """the penalty in force; None when its coefficient is 0"""

    @property
    def online(self) -> bool:
        """Return True if any source samples."""
        return any(source != DATA for source in self.sources)

    def for_step(self, step: int) -> Plan:
        """Return the plan of a step, counted from 1: terms with a cadence take part only in their steps."""
        terms = tuple(term for term in self.terms if step % term.every == 0)
        if len(terms) == len(self.terms):
            return self
        resting = {term.source for term in self.terms} - {term.source for term in terms}
        trained = {term.role for term in terms}
        credits = {
            key: credit if credit.after in trained else replace(credit, after="")
            for key, credit in self.credits.items()
            if step % credit.every == 0
        }
        return replace(self, terms=terms, credits=credits, sources=tuple(s for s in self.sources if s not in resting))

    def optimiser_steps(self, role: str) -> int:
        """Optimizer steps of a role in the whole run: what its schedule is laid over."""
        every = {term.every for term in self.terms if term.role == role}
        turns = sum(any(step % each == 0 for each in every) for step in range(1, self.config.steps + 1))
        return turns * self.config.update_epochs * self.config.minibatches

    @property
    def single_update(self) -> bool:
        """True if each batch gets one optimizer step. Whether a batch is on-policy is read from its versions."""
        return self.config.update_epochs == 1 and self.config.minibatches == 1

    @property
    def proximal(self) -> bool:
        """True if old log-probabilities are those of the weights that begin to train, of any sampler (Hilton et al. 2022).

        So it is in a run that samples ahead and corrects for it, if all who read them weigh tokens by old over sampler
        probabilities. Else they are those of the weights that sampled.
        """
        config, old = self.config, {"old_logprobs_NT"}
        readers = [term for term in self.terms if term.source != DATA and old & term.loss.needs]
        credited = any(spec.advantage is not None and old & spec.advantage.needs for spec in self.credits.values())
        corrected = all(term.loss.corrects for term in readers) and not credited
        return config.ahead > 0 and config.stale.correct == "on" and bool(readers) and corrected

    @property
    def trained_roles(self) -> tuple[str, ...]:
        """Names of the trained roles, in the order of their updates (`update_order`)."""
        return update_order(self.terms)

    @property
    def update_waves(self) -> tuple[tuple[str, ...], ...]:
        """Names of the trained roles, in tuples of those whose updates do not depend on each other.

        A role that credit waits for (`Term.after`) is alone: what follows sees those before it updated, and no others.
        """
        awaited = {credit.after for credit in self.credits.values()}
        waves: list[list[str]] = []
        for name in self.trained_roles:
            if waves and not awaited & {name, waves[-1][-1]}:
                waves[-1].append(name)
            else:
                waves.append([name])
        return tuple(map(tuple, waves))

    def updated_by(self, role: str) -> tuple[str, ...]:
        """Return the roles that have new weights in a step once `role` has; none for an empty name."""
        order = self.trained_roles
        return order[: order.index(role) + 1] if role else ()

    @property
    def tracking_roles(self) -> tuple[str, ...]:
        """Names of the roles whose weights follow a trained role's."""
        return tuple(name for name, spec in self.roles.items() if spec.tracking)

    @property
    def changing_roles(self) -> tuple[str, ...]:
        """Names of the roles whose weights change in the run, which checkpoints hold: trained and tracking ones."""
        return (*self.trained_roles, *self.tracking_roles)

    def base_owner(self, name: str) -> str:
        """The trained role whose model without its adapters is the frozen role `name`'s; empty if none is."""
        owner, differing = self.nearest_base(name)
        return "" if differing else owner

    def nearest_base(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return the role that `base_owner` would give if options of both were equal, and which of them are not.

        The role's name is empty if none trains adapters on the model of `name`.
        """
        frozen = self.roles[name]
        beside = any(name in term.partners for term in self.terms)  # both are computed together
        if frozen.trained or frozen.tracking or frozen.sampled or beside or not frozen.outputs <= LANGUAGE:
            return "", ()
        nearest: dict[str, tuple[str, ...]] = {}
        for spec in self.roles.values():
            speaks = spec.sampled or spec.outputs & LANGUAGE
            adapted = spec.trained and isinstance(spec.options, TrainedOptions) and spec.options.lora.rank > 0
            if speaks and adapted and spec.options.model == frozen.options.model:
                same = [each.name for each in fields(ModelOptions)]
                differs = (each for each in same if getattr(spec.options, each) != getattr(frozen.options, each))
                nearest[spec.name] = tuple(differs)
        owner = min(nearest, key=lambda each: len(nearest[each]), default="")
        return owner, nearest.get(owner, ())

    @property
    def tokenizer_role(self) -> str:
        """The role whose tokenizer reads the data: the policy, or where a command has none, its first role."""
        return self.policy if self.policy in self.roles else next(iter(self.roles))
