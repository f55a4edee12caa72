"""One optimizer step of a role over its terms.

For every micro-batch there is one forward pass per credited batch, shared by all terms on it; each term's values become
`weight * weighted_sum / count`, where the count is that of the whole step; and the gradients of everything are summed before
one update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from rlhf_core.training.nonfinite import Watch, keep_samples, term_name
from rlhf_core.training.observation import Evaluation, Observation
from rlhf_core.training.old_logprobs import OLD, with_live
from rlhf_core.training.reduction import Counts, Means, weighted_sum
from rlhf_core.training.shared_forward import ForwardCache, group_same_rows
from rlhf_core.training.token_budget import TokenBudget, release_memory
from rlhf_core.util.activity import report
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World

__all__ = ["OptimizerStep"]


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

    def run(self, work: Mapping[str, Batch], means: Means, compare: bool = False) -> None:
        """One optimizer step on a minibatch of each credited batch, or none where something is not finite and the run was
        told to continue."""
        config, found = self.plan.config, Means()
        try:
            if not any(batch.step.skip for batch in work.values()):
                self._update(work, found, compare)
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

    def _update(self, work: Mapping[str, Batch], means: Means, compare: bool) -> None:
        """Gradients of everything, then one update of the weights; none where no rank has a row, since credit may select
        none: momentum and decay would move the weights all the same.

        Raises:
            NotFinite: the loss or the gradient is not; the weights are as they were.
        """
        total, seen = self._gradients(work, means)
        watch, observation = seen.watch, seen.observation
        if not watch.micro_batches:
            means.add_sum(f"skipped/{self.name}", 1.0)
            return
        watch.check_loss(total)
        means.add(f"loss/{self.name}", total)
        if compare:
            for name, value in seen.mismatch.measure(self.world).items():
                means.add(name, value)
        metrics = dict(self._step(work, total, observation))
        if metrics.get("loss_scale", 0.0) > 1 and not isfinite(
            metrics["grad_norm"]
        ):  # of float16: the next one is less
            del metrics["grad_norm"]
            means.add_sum(f"skipped/{self.name}", 1.0)
        else:
            watch.check_gradient(metrics["grad_norm"], work)
            if self.average is not None:
                self.average.update(self.module, self.trainable.own_share)
        for name, value in metrics.items():
            means.add(f"{name}/{self.name}", value)

    def _step(self, work: Mapping[str, Batch], total: float, observation: Observation) -> Mapping[str, float]:
        """Update the weights; returns the strategy's metrics."""
        if not (self.optim.observes or self.optim.closure):
            return self.trainable.step()
        trainable = cast("SecondOrderTrainable", self.trainable)  # `check_second_order` has asked the strategy
        observation.hand_over(trainable.optimizer, self.world)
        if not self.optim.closure:
            return trainable.step()

        def again() -> float:
            trainable.discard()
            self.forward_cache.clear()
            loss, seen = self._gradients(work, Means())
            seen.observation.hand_over(trainable.optimizer, self.world)
            return loss

        return trainable.step(Evaluation(total, again, partial(self._product, work)))

    def _product(self, work: Mapping[str, Batch], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the Hessian of the step's loss over all ranks, times `vectors`; gradients at hand stay as they are."""
        check_second_derivatives(self.plan.config, self.spec, self.module)
        whole = [self.trainable.full(vector).clone() for vector in vectors]
        with self.trainable.differentiable() as parameters, second_derivatives(self.name):
            found = HessianProduct(parameters, whole)
            self._sweep(work, Means(), StepRecord.new(self), found.add)
        products = [torch.zeros_like(vector) for vector in vectors]
        for product, total in zip(products, found.total, strict=True):
            self.trainable.assign(product, self.world.sum(total) if self.world.size > 1 else total)
        return products

    def _gradients(self, work: Mapping[str, Batch], means: Means) -> tuple[float, StepRecord]:
        """Add up the gradients of one optimizer step; its loss over all ranks, and what was seen of it.

        Where memory runs out and the token budget may be halved, it begins again from no gradient at all.
        """
        while True:
            found, seen = Means(), StepRecord.new(self)
            try:
                total = self._sweep(work, found, seen, self.trainable.backward)
                means.merge(found)
                if self.world.size == 1:
                    return total, seen
                losses, mismatches = zip(*self.world.gather((total, seen.mismatch.numbers())), strict=True)
                seen.mismatch.take_all(mismatches)
                return sum(losses), seen
            except Exception as error:
                if not self.budget.halve(error):
                    raise
            self.trainable.discard()
            self.forward_cache.clear()
            release_memory()

    def _sweep(
        self, work: Mapping[str, Batch], means: Means, seen: StepRecord, backward: Callable[[Tensor], None]
    ) -> float:
        """Run every micro-batch forward and hand its share of the loss to `backward`; returns this rank's loss."""
        total = 0.0
        for keys in group_same_rows(work):
            terms = [(term, work[key]) for key in keys for of, term in self.spec.terms if of == key]
            total += self._accumulate(terms, work[keys[0]], means, seen, backward)
        return total

    def _accumulate(
        self,
        terms: list[tuple[Term, Batch]],
        batch: Batch,
        means: Means,
        seen: StepRecord,
        backward: Callable[[Tensor], None],
    ) -> float:
        """Differentiate `terms`, each on its credited batch, all of `batch`'s rows; this rank's share of their loss."""
        unit = lcm(*(term.unit for term, _ in terms))
        names = seen.observation.outputs.union(*(term.outputs for term, _ in terms))
        cuts = micro_rows(batch, self.budget.tokens, unit, bearable_padding(self.module))
        options = self.spec.options
        coef = options.router_aux_coef if isinstance(options, TrainedOptions) else 0.0
        names |= {ROUTER_LOSS} if coef else set()
        everyone = self.world.gather((len(cuts), _tokens(batch), Counts.measure(batch)))
        tokens, counts = sum(each for _, each, _ in everyone), Counts([each for *_, each in everyone])
        if cuts:
            means.add("padding", padding_share(batch, cuts, self.module.packs))
        total = 0.0
        for i in range(rounds := max(each for each, *_ in everyone)):  # ranks step together: weights may be sharded
            report(f"training the {self.name}", i, rounds)
            live = float(i < len(cuts))
            micro = micro_batch(batch, cuts, i, unit)
            self.budget.record_attempt(micro, unit)
            outputs = _to_batch_device(
                micro,
                self.forward_cache.take(micro, names) or self.forward_cache.compute(self.trainable, micro, names),
            )
            loss: Tensor | float = 0.0
            values: dict[str, Tensor] = {}
            for term, credited in terms:
                own = micro if credited is batch else micro_batch(credited, cuts, i, unit)
                own = self._with_old_logprobs(term, own, outputs)
                result = check_loss_terms(term, term.loss(outputs, own), own)
                divisor = max(counts(result.reduction, term.unit), 1e-12)
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
                here = live * _tokens(micro)
                loss = loss + coef * here / max(tokens, 1.0) * outputs[ROUTER_LOSS]
                means.add(f"{self.name}/{ROUTER_LOSS}", here * float(outputs[ROUTER_LOSS].detach()), here)
            assert isinstance(loss, torch.Tensor)
            seen.observation.add(micro, outputs, values, live > 0, cuts[i] if live else None)
            if live and any(term.source == self.name for term, _ in terms) and "logprobs_NT" in outputs:
                seen.mismatch.add(micro, outputs["logprobs_NT"])
            if self.forward_cache.tape is not None:
                self.forward_cache.tape.add_losses(micro, values)
            backward(loss)
            reached = float(loss.detach())
            seen.watch.micro_batch(reached, values, micro)
            total += reached
        return total

    def _with_old_logprobs(self, term: Term, micro: Batch, outputs: Mapping[str, Tensor]) -> Batch:
        """Give a term the log-probabilities of this very pass as old ones, where `training.old_logprobs` decides so. A
        batch sampled by another role keeps what that role recorded."""
        live = OLD in term.needs and term.source in (DATA, self.name) and self.plan.single_update
        return with_live(micro, outputs["logprobs_NT"], self.version, self.plan.proximal) if live else micro


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


def _tokens(batch: Batch) -> float:
    """Tokens that a forward pass reads, padding left out."""
    return float((batch.prompt_lengths_N + batch.lengths_N).sum())


def _to_batch_device(micro: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`outputs` on the device of the rows that losses compare them with, the CPU: a few numbers per token, and the gradient
    finds its way back."""
    return {name: values.to(micro.tokens_NT.device) for name, values in outputs.items()}
