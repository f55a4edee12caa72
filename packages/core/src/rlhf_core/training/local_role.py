"""A role in this process: its model under a strategy, inference for needs, and the optimiser step over its terms.

The step is the heart of the contract. For every micro-batch there is one forward pass per credited batch, shared by all
terms on it; each term's values become `weight * weighted_sum / count`, where the count is that of the whole step; and the
gradients of everything are summed before one update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import Lora, TrainedOptions
from rlhf_core.contract.plan import DATA, Plan, RoleSpec
from rlhf_core.contract.providers import Strategy
from rlhf_core.contract.requirements import ROUTER_LOSS
from rlhf_core.contract.roles import Trainable
from rlhf_core.contract.terms import Term
from rlhf_core.errors import ContractError, NotFinite, UsageError
from rlhf_core.lazy import torch
from rlhf_core.training.determinism import be_deterministic
from rlhf_core.training.loss_checks import add_by_source, check_loss_terms
from rlhf_core.training.microbatch import bearable_padding, micro_batch, micro_rows, minibatches, padding_share
from rlhf_core.training.nonfinite import SKIP, Watch, keep_samples, term_name
from rlhf_core.training.reduction import Means, count, weighted_sum
from rlhf_core.training.shared_forward import ForwardCache, group_same_rows
from rlhf_core.training.token_budget import TokenBudget, release_memory

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LocalRole"]


class LocalRole:
    """The role `name` of `plan`, held by this process.

    Args:
        plan: the run.
        name: which of its roles.
        frozen: a copy that is never trained here, of the weights that the role has elsewhere.
        base_owner: a role whose model without its adapters this one is (`Plan.base_owner`).
    """

    def __init__(self, plan: Plan, name: str, frozen: bool = False, base_owner: LocalRole | None = None) -> None:
        self.name = name
        self.plan = plan
        self.spec = plan.roles[name]
        self.version = 0
        self.kept = ForwardCache()
        config = plan.config
        if config.deterministic:
            be_deterministic()
        if base_owner is not None and hasattr(base_owner.trainable, "shared_base"):
            self.trainable: Trainable = base_owner.trainable.shared_base()
            self.world = self.trainable.world
            self.budget = TokenBudget(config, name, self.world)
            return
        spec = _without_adapters(self.spec) if frozen else self.spec
        build = partial(_build, spec, chunk=config.chunk, temperature=self.spec.temperature, seed=config.seed)
        strategy: Strategy = config.providers["strategy"]
        optim = getattr(self.spec.options, "optim", None) if self.spec.trained and not frozen else None
        self.trainable = strategy(build, optim, plan.optimiser_steps(name))
        self.world = self.trainable.world
        self.budget = TokenBudget(config, name, self.world)
        self._check_and_tell()
        for option, chosen in (("on-oom", config.on_oom), ("on-nonfinite", config.on_nonfinite)):
            if optim is not None and chosen != "stop" and not hasattr(self.trainable, "discard"):
                strategy_name = config.names.get("strategy", "")
                raise UsageError(f"--strategy {strategy_name} cannot take a step back; leave out --{option} {chosen}")

    @property
    def module(self) -> Any:
        """The role's `RoleModule`."""
        return self.trainable.module

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face causal language model inside, the very weights that are trained."""
        return self.module.causal_lm

    @property
    def average(self) -> Any:
        """The moving average of the weights, if there is one; see `models.average`."""
        return getattr(self.module, "average", None)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the role's model."""
        from rlhf_core.models.loading.load import load_tokenizer

        return load_tokenizer(self.spec.options.model, self.spec.options)

    def _check_and_tell(self) -> None:
        """Say what is trained, where it is not everything."""
        if self.average is not None and any(parameter.numel() == 0 for parameter in self.module.parameters()):
            raise UsageError(f"--{self.name}.ema follows whole weights, and the strategy shards them; leave it out")
        frozen = getattr(self.module, "frozen", {})
        if self.world.rank == 0 and (frozen or getattr(self.module, "adapters", None) is not None):
            from rlhf_core.models.freezing import trained_share

            print(f"rlhf-run: the {self.name} trains {trained_share(self.module)}", file=sys.stderr)

    def bind_comparisons(self, roles: Mapping[str, LocalRole]) -> None:
        """Let outputs that compare with another role be computed: `<role>.<output>`, by the `compare` of the loss."""
        for _, term in self.spec.terms:
            for name in term.wants:
                other, _, _ = name.rpartition(".")
                if other:
                    _compare(self.module, name, roles[other].module, term.loss)

    # ------------------------------------------------------------------------------------------------------------------

    def infer(self, batch: Batch, wants: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """The wanted outputs of all rows: no gradient, on the CPU, zero where there is no completion.

        `source` is said if this role is about to be trained on the batch, which came from there.
        """
        while True:
            try:
                return self._infer(batch, wants, source)
            except Exception as error:
                if not self.budget.halve(error):
                    raise
            self.kept.clear()
            release_memory()  # not before the error, which holds what was computed, is gone

    def _infer(self, batch: Batch, wants: frozenset[str], source: str) -> dict[str, Tensor]:
        """The same within the token budget as it is."""
        found = {name: torch.zeros(batch.tokens_NT.shape if name.endswith("_NT") else (len(batch),)) for name in wants}
        cuts = micro_rows(batch, self.budget.tokens, padding=bearable_padding(self.module))
        later = self._later_wants(source) if len(cuts) == 1 else frozenset()
        with torch.enable_grad() if later else torch.inference_mode():
            for i in range(self._rounds(cuts)):
                micro = micro_batch(batch, cuts, i)
                self.budget.trying(micro)
                outputs = self.trainable.forward(micro, wants | later)
                if later and not i:
                    self.kept.add(micro, outputs)
                for rows, name in product(cuts[i : i + 1], wants):
                    values = outputs[name].detach()
                    if name.endswith("_NT"):
                        found[name][rows, : values.shape[1]] = values.float().cpu()
                    else:
                        found[name][rows] = values.float().cpu()
        return found

    def _later_wants(self, source: str) -> frozenset[str]:
        """What training on a batch of `source` will want of the same pass; nothing where it must be another one."""
        lora = getattr(self.spec.options, "lora", None)
        if not (source and self.plan.on_policy and getattr(self.trainable, "keeps_graphs", False)):
            return frozenset()
        if lora is not None and lora.rank and lora.dropout:  # then training computes something else
            return frozenset()
        return frozenset[str]().union(*(term.wants for _, term in self.spec.terms if term.source == source))

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        """`epochs` passes of `minibatches` optimiser steps over the credited batches, by credit key."""
        config = self.plan.config
        means = Means()
        if config.on_nonfinite == "skip":
            means.add_sum(f"skipped/{self.name}", 0.0)
        for _ in range(config.epochs):
            seed = (config.seed << 32) + self.version
            keys = [key for key in dict(self.spec.terms) if key in work]  # others are of terms that rest in this step
            parts = {k: minibatches(work[k], config.minibatches, seed, self.world) for k in keys}
            for _ in range(config.minibatches):
                self._step({key: next(part) for key, part in parts.items()}, means)
                self.kept.clear()
                self.version += 1
        return means.reduced(self.world if self.world.size > 1 else None)

    def _step(self, work: Mapping[str, Batch], means: Means) -> None:
        """One optimiser step on a minibatch of each credited batch, or none where something is not finite and the run was
        told to go on."""
        config, found = self.plan.config, Means()
        try:
            if not any(batch.scalars.get(SKIP) for batch in work.values()):
                self._update(work, found)
                means.merge(found)
                if config.on_oom == "halve":
                    means.add(f"micro_tokens/{self.name}", self.budget.tokens)
                return
        except NotFinite as error:  # on every rank
            if config.on_nonfinite == "stop":
                raise
            self.trainable.discard()  # type: ignore[attr-defined]  # checked at the start
            step = round(next(iter(work.values())).scalars.get("step", 0))
            path = keep_samples(config.output, step, error)
            print(f"rlhf-run: step {step} goes without an update: {error}; samples are in {path}", file=sys.stderr)
        means.add_sum(f"skipped/{self.name}", 1.0)

    def _update(self, work: Mapping[str, Batch], means: Means) -> None:
        """Gradients of everything, then one update of the weights; none where no rank has a row, since credit may select
        none: momentum and decay would move the weights all the same.

        Raises:
            NotFinite: the loss or the gradient is not; the weights are as they were.
        """
        total, watch = self._gradients(work, means)
        if not watch.micro_batches:
            means.add_sum(f"skipped/{self.name}", 1.0)
            return
        watch.check_loss(total)
        means.add(f"loss/{self.name}", total)
        metrics = dict(self.trainable.step())
        if metrics.get("loss_scale", 0.0) > 1 and not isfinite(
            metrics["grad_norm"]
        ):  # of float16: the next one is less
            del metrics["grad_norm"]
            means.add_sum(f"skipped/{self.name}", 1.0)
        else:
            watch.check_gradient(metrics["grad_norm"], work)
            if self.average is not None:
                self.average.update()
        for name, value in metrics.items():
            means.add(f"{name}/{self.name}", value)

    def _gradients(self, work: Mapping[str, Batch], means: Means) -> tuple[float, Watch]:
        """Add up the gradients of one optimiser step; its loss over all ranks, and what was seen of it.

        Where memory runs out and the token budget may be halved, it begins again from no gradient at all.
        """
        while True:
            total, watch, found = 0.0, Watch(self.name), Means()
            try:
                for keys in group_same_rows(work):
                    terms = [(term, work[key]) for key in keys for of, term in self.spec.terms if of == key]
                    total += self._accumulate(terms, work[keys[0]], found, watch)
                means.merge(found)
                return self.world_total(total), watch
            except Exception as error:
                if not self.budget.halve(error):
                    raise
            self.trainable.discard()  # type: ignore[attr-defined]  # checked at the start
            self.kept.clear()
            release_memory()

    def world_total(self, value: float) -> float:
        """A number summed over the ranks of this role."""
        if self.world.size == 1:
            return value
        return float(self.world.sum(torch.tensor(value, dtype=torch.float64)))

    def _accumulate(self, terms: list[tuple[Term, Batch]], batch: Batch, means: Means, watch: Watch) -> float:
        """Add the gradients of `terms`, each on its credited batch, all of `batch`'s rows; this rank's share of their loss."""
        unit = lcm(*(term.unit for term, _ in terms))
        wants = frozenset[str]().union(*(term.wants for term, _ in terms))
        cuts = micro_rows(batch, self.budget.tokens, unit, bearable_padding(self.module))
        coef: float = getattr(self.spec.options, "router_aux_coef", 0.0)
        wants |= {ROUTER_LOSS} if coef else set()
        tokens = self.world_total(_tokens(batch)) if coef else 0.0
        if cuts:
            packs = getattr(self.module, "packs", False)  # strategies may train other modules than ours
            means.add("padding", padding_share(batch, cuts, packs))
        counts: dict[int, float] = {}
        total = 0.0
        for i in range(self._rounds(cuts)):
            live = float(i < len(cuts))
            micro = micro_batch(batch, cuts, i, unit)
            self.budget.trying(micro, unit)
            outputs = _to_batch_device(micro, self.kept.take(micro, wants) or self.trainable.forward(micro, wants))
            loss: Tensor | float = 0.0
            values: dict[str, Tensor] = {}
            for k, (term, credited) in enumerate(terms):
                own = micro if credited is batch else micro_batch(credited, cuts, i, unit)
                own = self._with_old_logprobs(term, own, outputs)
                result = check_loss_terms(term, term.loss(outputs, own), own)
                if k not in counts:
                    counts[k] = self.world_total(count(result.reduction, batch, term.unit))
                share = weighted_sum(result.values, result.reduction, own) / max(counts[k], 1e-12)
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
            self.trainable.backward(loss)
            reached = float(loss.detach())
            watch.micro_batch(reached, values, micro)
            total += reached
        return total

    def _rounds(self, cuts: list[Tensor]) -> int:
        """How many forward passes to run on this rank's micro-batches. Ranks step together, since weights may be sharded over
        them: one that has fewer repeats rows with no weight."""
        return max(self.world.gather(len(cuts))) if self.world.size > 1 else len(cuts)

    def _with_old_logprobs(self, term: Term, micro: Batch, outputs: Mapping[str, Tensor]) -> Batch:
        """With one optimiser step per batch the policy that is trained is the one that sampled: its log-probabilities
        are the live ones, detached, at no cost and with a ratio of exactly one. A batch sampled by another role keeps
        what that role recorded."""
        if "old_logprobs_NT" in term.needs and term.source in ("data", self.name) and self.plan.on_policy:
            return micro.with_extras(old_logprobs_NT=outputs["logprobs_NT"].detach())
        return micro

    # ------------------------------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names."""
        return self.trainable.weights()

    def gathered(self) -> AbstractContextManager[None]:
        """While it is open, the module holds full weights, and each rank may use it by itself."""
        return self.trainable.gathered()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights under their Hugging Face names: what keeps a copy of a role trained elsewhere up to date."""
        own = dict(self.weights())
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)

    def save(self, folder: str) -> None:
        """Checkpoint state: model, optimiser, schedule."""
        self.trainable.save(folder)

    def snapshot(self) -> Callable[[str], None] | None:
        """A copy of what `save` would write, as what writes it; None where the strategy takes none (see `Trainable`)."""
        snapshot: Callable[[], Callable[[str], None]] | None = getattr(self.trainable, "snapshot", None)
        return snapshot() if snapshot is not None else None

    def load(self, folder: str) -> None:
        """Restore what `save` wrote."""
        self.trainable.load(folder)

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder: model, tokenizer, template, generation config, model card. Every rank takes part.

        A moving average of the weights goes to `FOLDER-ema`, or takes their place, as the role's options say.
        """
        instead = self.average is not None and self.spec.options.ema_export == "model"  # type: ignore[attr-defined]
        if not instead:
            self._export(folder)
        if self.average is not None:
            with self.average.in_place():
                self._export(folder if instead else f"{folder}-ema")

    def _export(self, folder: str) -> None:
        """Write the weights that the module has now."""
        from rlhf_core.models.export.folder import export

        leads = self.world.rank == 0
        adapted = self.module.adapters is not None  # then the model's own weights are where they came from
        state = {} if adapted else {name: tensor.cpu() for name, tensor in self.weights() if leads}
        with self.trainable.gathered(self.module.own_parts):
            if leads:
                card = {"base": self.spec.options.model, "algorithm": self.plan.config.names.get("algorithm", "")}
                shard = self.plan.config.export_shard
                export(self.module, self.tokenizer, folder, state=state, shard=shard, **card)
        self.world.barrier()


def _tokens(batch: Batch) -> float:
    """Tokens that a forward pass reads, padding left out."""
    return float((batch.prompt_lengths_N + batch.lengths_N).sum())


def _without_adapters(spec: RoleSpec) -> RoleSpec:
    """The spec of a copy that takes merged weights: without adapters."""
    if not isinstance(spec.options, TrainedOptions):
        return spec
    plain = replace(spec.options, lora=Lora(), quantize="none", freeze=(), ema=0.0)
    return replace(spec, options=plain)


def _to_batch_device(micro: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`outputs` on the device of the rows that losses compare them with, the CPU: a few numbers a token, and the gradient
    finds its way back."""
    return {name: values.to(micro.tokens_NT.device) for name, values in outputs.items()}


def _compare(module: Any, name: str, other: Any, loss: Any) -> None:
    """Let `module` give the output `name`; models are imported only when there is one."""
    from rlhf_core.models.heads.compare import Comparison

    if module.comparisons.setdefault(name, Comparison(other, loss.compare)).function != loss.compare:
        raise ContractError(f"two losses want different functions as {name!r}; let their names differ")


def _build(spec: RoleSpec, **options: Any) -> Any:
    """The role's module; models are imported only when one is built."""
    from rlhf_core.models.module import build_module

    return build_module(spec, **options)
