"""One optimizer step of a role over its terms.

For every micro-batch there is one forward pass per credited batch, shared by all terms on it; each term's values become
`weight * weighted_sum / count`, where the count is that of the whole step; and the gradients of everything are summed before
one update. The counts of every step of an iteration are agreed on before its first, and its scalars are added up after its
last: between the two, ranks exchange gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any, cast

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import OptimizerProvider
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.plan import DATA, Plan, RoleSpec
from rlhf_core.contract.requirements import ROUTER_LOSS
from rlhf_core.contract.roles import SecondOrderTrainable, Trainable
from rlhf_core.contract.terms import Term
from rlhf_core.errors import NotFinite
from rlhf_core.lazy import torch
from rlhf_core.training.hessian import HessianProduct, check_second_derivatives, second_derivatives
from rlhf_core.training.loss_checks import add_by_source, check_loss_terms
from rlhf_core.training.microbatch import bearable_padding, micro_batch, micro_rows, padding_share
from rlhf_core.training.mismatch import Mismatch
from rlhf_core.training.nonfinite import Watch, keep_samples, term_name, with_nan_gradient
from rlhf_core.training.observation import Evaluation, Observation
from rlhf_core.training.old_logprobs import OLD, with_live
from rlhf_core.training.reduction import Counts, Means, token_count, weighted_sum
from rlhf_core.training.shared_forward import ForwardCache, group_same_rows
from rlhf_core.training.token_budget import TokenBudget, release_memory
from rlhf_core.util.activity import report
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["OptimizerStep"]

CountsByKey = Mapping[str, Counts]
"""Counts of a minibatch over all ranks, by the first credit key of those that share rows"""


@dataclass(frozen=True)
class OptimizerStep:
    """The optimizer steps of one role: gradients of its terms, then an update of its weights.

    Args:
        plan: the run.
        spec: the role.
        trainable: its model under a strategy.
        budget: tokens that a micro-batch may hold.
        forward_cache: forward passes that were computed with a gradient before; taken instead of computing them again.
    """

    plan: Plan
    spec: RoleSpec
    trainable: Trainable
    budget: TokenBudget
    forward_cache: ForwardCache
    version: int
    """version of the weights before these steps"""

    @property
    def name(self) -> str:
        """The role's name."""
        return self.spec.name

    @property
    def world(self) -> World:
        """The ranks that train the role together."""
        return self.trainable.world

    @property
    def module(self) -> Any:
        """The role's `RoleModule`."""
        return self.trainable.module

    @property
    def average(self) -> Any:
        """The moving average of the weights, if there is one."""
        return self.module.average

    @property
    def optim(self) -> OptimizerProvider:
        """The provider of the role's optimizer."""
        options = self.spec.options
        assert isinstance(options, TrainedOptions), "a role that is trained has an optimizer"
        return options.optim

    def measure(self, minibatches: Iterable[Mapping[str, Batch]]) -> list[CountsByKey]:
        """Return the counts of each minibatch over all ranks, by the credit key of its rows. Collective: one call for all."""
        everyone = self.world.gather([self._measure(work) for work in minibatches])
        return [
            {key: Counts.add_up([rank[key] for rank in ranks]) for key in ranks[0]}
            for ranks in zip(*everyone, strict=True)
        ]

    def _measure(self, work: Mapping[str, Batch]) -> dict[str, Counts]:
        """Return the counts of this rank's part of a minibatch; none of one that is not trained on."""
        if any(batch.step.skip for batch in work.values()):
            return {}
        return {keys[0]: Counts.measure(work[keys[0]], len(self._cuts(work, keys))) for keys in group_same_rows(work)}

    def run(self, work: Mapping[str, Batch], counts: CountsByKey, means: Means, compare: bool = False) -> None:
        """One optimizer step on a minibatch of each credited batch, or none where something is not finite and the run was
        told to continue. `counts` are those of the minibatch over all ranks (`measure`)."""
        config, found = self.plan.config, Means()
        try:
            if not any(batch.step.skip for batch in work.values()):
                self._update(work, counts, found, compare)
                means.merge(found)
                if config.on_oom == "halve":
                    means.add(f"micro_tokens/{self.name}", self.budget.tokens)
                return
        except NotFinite as error:  # on every rank
            if config.on_nonfinite == "stop":
                raise
            self.trainable.discard()
            step = next(iter(work.values())).step.number
            path = keep_samples(config.output, step, error)
            log.warning(f"step {step} skips its update: {error}; the samples are in {path}")
        means.add_sum(f"skipped/{self.name}", 1.0)

    def _update(self, work: Mapping[str, Batch], counts: CountsByKey, means: Means, compare: bool) -> None:
        """Gradients of everything, then one update of the weights; none where no rank has a row, since credit may select
        none: momentum and decay would move the weights all the same.

        Raises:
            NotFinite: the loss or the gradient is not; the weights are as they were.
        """
        own, seen = self._gradients(work, counts, means)
        watch = seen.watch
        if not watch.micro_batches:
            means.add_sum(f"skipped/{self.name}", 1.0)
            return
        means.add(f"loss/{self.name}", own, float(self.world.rank == 0))  # one step's, summed over ranks
        metrics = dict(self._step(work, counts, own, seen, compare))
        if compare:
            means.merge(seen.mismatch.means)
        finite = isfinite(metrics["grad_norm"])  # on every rank or on none, like the norm
        if not finite:
            watch.check_loss(self.world.total(own))
        if metrics.get("loss_scale", 0.0) > 1 and not finite:  # of float16: the next one is less
            del metrics["grad_norm"]
            means.add_sum(f"skipped/{self.name}", 1.0)
        else:
            watch.check_gradient(metrics["grad_norm"], work)
            if self.average is not None:
                self.average.update(self.module, self.trainable.own_share)
        for name, value in metrics.items():
            means.add(f"{name}/{self.name}", value)

    def _step(
        self, work: Mapping[str, Batch], counts: CountsByKey, own: float, seen: StepRecord, compare: bool
    ) -> Mapping[str, float]:
        """Update the weights; returns the strategy's metrics. `own` is this rank's part of the loss.

        Ranks exchange nothing but gradients here, unless the loss or a sum over rows has a reader before the update.
        """
        observing, stops = self.optim.observes or self.optim.closure, compare and self.plan.config.on_mismatch == "stop"
        if not (observing or stops):
            return self.trainable.step()
        loss = self.world.total(own)
        seen.watch.check_loss(loss)
        if stops:
            seen.mismatch.check(self.world)
        if not observing:
            return self.trainable.step()
        trainable = cast("SecondOrderTrainable", self.trainable)  # `check_second_order` has asked the strategy
        seen.observation.hand_over(trainable.optimizer, self.world)
        if not self.optim.closure:
            return trainable.step()

        def again() -> float:
            trainable.discard()
            self.forward_cache.clear()
            loss, seen = self._gradients(work, counts, Means())
            seen.observation.hand_over(trainable.optimizer, self.world)
            return self.world.total(loss)

        return trainable.step(Evaluation(loss, again, partial(self._product, work, counts)))

    def _product(self, work: Mapping[str, Batch], counts: CountsByKey, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian of the step's loss over all ranks, times `vectors`; gradients at hand stay as they are."""
        check_second_derivatives(self.plan.config, self.spec, self.module)
        whole = [self.trainable.full(vector).clone() for vector in vectors]
        with self.trainable.differentiable() as parameters, second_derivatives(self.name):
            found = HessianProduct(parameters, whole)
            self._sweep(work, counts, Means(), StepRecord.new(self), found.add)
        products = [torch.zeros_like(vector) for vector in vectors]
        for product, total in zip(products, found.total, strict=True):
            self.trainable.assign(product, self.world.sum(total) if self.world.size > 1 else total)
        return products

    def _gradients(self, work: Mapping[str, Batch], counts: CountsByKey, means: Means) -> tuple[float, StepRecord]:
        """Add up the gradients of one optimizer step; this rank's part of its loss, and what was seen of it.

        Where memory runs out and the token budget may be halved, it begins again from no gradient at all.
        """
        while True:
            found, seen = Means(), StepRecord.new(self)
            try:
                total = self._sweep(work, counts, found, seen, self.trainable.backward)
                means.merge(found)
                return total, seen
            except Exception as error:
                if not self.budget.halve(error):
                    raise
            self.trainable.discard()
            self.forward_cache.clear()
            release_memory()

    def _sweep(
        self,
        work: Mapping[str, Batch],
        counts: CountsByKey,
        means: Means,
        seen: StepRecord,
        backward: Callable[[Tensor], None],
    ) -> float:
        """Run every micro-batch forward and hand its share of the loss to `backward`; returns this rank's loss."""
        total = 0.0
        for keys in group_same_rows(work):
            terms = [(term, work[key]) for key in keys for of, term in self.spec.terms if of == key]
            cuts = self._cuts(work, keys)
            total += self._accumulate(terms, cuts, counts[keys[0]], means, seen, backward)
        return total

    def _cuts(self, work: Mapping[str, Batch], keys: Sequence[str]) -> list[Tensor]:
        """Return the row numbers of each micro-batch of the rows that the credits `keys` share."""
        unit = lcm(*(term.unit for of, term in self.spec.terms if of in keys))
        return micro_rows(work[keys[0]], self.budget.tokens, unit, bearable_padding(self.module))

    def _accumulate(
        self,
        terms: list[tuple[Term, Batch]],
        cuts: list[Tensor],
        counts: Counts,
        means: Means,
        seen: StepRecord,
        backward: Callable[[Tensor], None],
    ) -> float:
        """Differentiate `terms`, each on its credited batch of the same rows; this rank's share of their loss."""
        batch = terms[0][1]
        unit = lcm(*(term.unit for term, _ in terms))
        names = seen.observation.outputs.union(*(term.outputs for term, _ in terms))
        options = self.spec.options
        coef = options.router_aux_coef if isinstance(options, TrainedOptions) else 0.0
        names |= {ROUTER_LOSS} if coef else set()
        if cuts:
            means.add("padding", padding_share(batch, cuts, self.module.packs))
        total = 0.0
        rounds = max(counts.rounds, len(cuts))  # ranks step together: weights may be sharded; alone, halving adds some
        for i in range(rounds):
            report(f"training the {self.name}", i, rounds)
            live = float(i < len(cuts))
            micro = micro_batch(batch, cuts, i, unit, counts.kept)
            self.budget.record_attempt(micro, unit)
            outputs = _to_batch_device(
                micro,
                self.forward_cache.take(micro, names) or self.forward_cache.compute(self.trainable, micro, names),
            )
            loss: Tensor | float = 0.0
            values: dict[str, Tensor] = {}
            for term, credited in terms:
                own = micro if credited is batch else micro_batch(credited, cuts, i, unit, counts.kept)
                own = self._with_old_logprobs(term, own, outputs, weighed=live > 0)
                result = check_loss_terms(term, term.loss(outputs, own), own)
                divisor = max(counts.denominator(result.reduction, term.unit), 1e-12)
                share = weighted_sum(result.values, result.reduction, own) / divisor
                loss = loss + live * term.weight * share
                values[term_name(term)] = result.values
                if live:
                    for name, metric in result.metrics.items():
                        means.add_metric(f"{self.name}/{name}", metric)
                    if term.source == DATA:
                        part = next(str(i) for i, (_, each) in enumerate(self.spec.terms) if each is term)
                        add_by_source(means, self.name, term, part, outputs, own)
            if coef:
                here = live * token_count(micro)
                loss = loss + coef * here / max(counts.tokens, 1.0) * outputs[ROUTER_LOSS]
                means.add(f"{self.name}/{ROUTER_LOSS}", here * float(outputs[ROUTER_LOSS].detach()), here)
            assert isinstance(loss, torch.Tensor)
            seen.observation.add(micro, outputs, values, live > 0, cuts[i] if live else None)
            if live and any(term.source == self.name for term, _ in terms) and "logprobs_NT" in outputs:
                seen.mismatch.add(micro, outputs["logprobs_NT"])
            if self.forward_cache.tape is not None:
                self.forward_cache.tape.add_losses(micro, values)
            reached = float(loss.detach())
            seen.watch.micro_batch(reached, values, micro)
            backward(loss if isfinite(reached) else with_nan_gradient(loss, outputs))
            total += reached
        return total

    def _with_old_logprobs(self, term: Term, micro: Batch, outputs: Mapping[str, Tensor], weighed: bool) -> Batch:
        """Give a term the log-probabilities of this very pass as old ones, where `training.old_logprobs` decides so. A
        batch sampled by another role keeps what that role recorded. Rows without weight, which may be made up and of no
        version, take those of this pass whatever sampled them."""
        live = OLD in term.needs and term.source in (DATA, self.name) and self.plan.single_update
        proximal = self.plan.proximal or not weighed
        return with_live(micro, outputs["logprobs_NT"], self.version, proximal) if live else micro


@dataclass(frozen=True)
class StepRecord:
    """Measurements of one optimizer step before its update."""

    watch: Watch
    observation: Observation
    mismatch: Mismatch

    @classmethod
    def new(cls, step: OptimizerStep) -> StepRecord:
        """Return a record of nothing yet."""
        return cls(Watch(step.name), Observation(step.optim), Mismatch(step.plan.config, step.spec, step.version))


def _to_batch_device(micro: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`outputs` on the device of the rows that losses compare them with, the CPU: a few numbers per token, and the gradient
    finds its way back."""
    return {name: values.to(micro.tokens_NT.device) for name, values in outputs.items()}
