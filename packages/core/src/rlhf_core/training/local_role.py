"""A role in this process: its model under a strategy, inference for needs, training by `optimizer_step`, and export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.options import Lora, TrainedOptions
from rlhf_core.contract.plan import Plan, RoleSpec
from rlhf_core.contract.providers import Strategy
from rlhf_core.contract.requirements import place, shape_of, split_output
from rlhf_core.contract.roles import Role, Trainable
from rlhf_core.errors import ContractError, OptionError, UsageError, options_under, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.determinism import be_deterministic
from rlhf_core.training.microbatch import Minibatches, bearable_padding, joint_rounds, micro_batch, micro_rows
from rlhf_core.training.mismatch import report_mismatch
from rlhf_core.training.observation import check_second_order
from rlhf_core.training.optimizer_step import OptimizerStep
from rlhf_core.training.reduction import Means, SharedNames
from rlhf_core.training.shared_forward import ForwardCache
from rlhf_core.training.taken_weights import TakenWeights, read_weights, snapshot_weights
from rlhf_core.training.token_budget import TokenBudget, release_memory
from rlhf_core.util.activity import report
from rlhf_core.util.device_memory import allocated_bytes
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LocalRole"]


class LocalRole(Role):
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
        self.forward_cache = ForwardCache()
        self._names = SharedNames()
        """names of the metrics that its ranks add up"""
        config = plan.config
        if config.deterministic:
            be_deterministic()
        shared = base_owner.trainable.shared_base() if base_owner is not None else None
        if shared is not None:
            self.trainable: Trainable = shared
            self.world = self.trainable.world
            self.budget = TokenBudget(config, name, self.world)
            return
        spec = _without_adapters(self.spec) if frozen else self.spec
        saved = self.spec.trained and not frozen and name in (plan.policy, *plan.exports)
        build = partial(_build, spec, saved, chunk=config.chunk, temperature=self.spec.temperature, seed=config.seed)
        strategy: Strategy = config.providers["strategy"]
        options = self.spec.options
        optim = options.optim if isinstance(options, TrainedOptions) and self.spec.trained and not frozen else None
        check_second_order(strategy, config.names.get("strategy", ""), optim)
        with options_under("/strategy"):
            self.trainable = strategy(build, optim, plan.optimiser_steps(name))
        self.world = self.trainable.world
        self.budget = TokenBudget(config, name, self.world)
        self._check_and_report()
        for name, chosen in (("on_oom", config.on_oom), ("on_nonfinite", config.on_nonfinite)):
            if optim is not None and chosen != "stop" and not self.trainable.discards:
                strategy_name, leave_out = config.names.get("strategy", ""), run_option(name, chosen)
                raise UsageError(f"strategy {strategy_name!r} cannot undo a step; leave out {leave_out}")

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
        """The moving average of the weights, if there is one; see `models.ema`."""
        return self.module.average

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the role's model."""
        from rlhf_core.models.loading.tokenizer import load_tokenizer

        return load_tokenizer(self.spec.options.model, self.spec.options)

    def _check_and_report(self) -> None:
        """Check what a sharding strategy cannot do, and log what is trained where it is not everything."""
        if self.trainable.sharded:
            self.module.sharded = True
            if isinstance(self.spec.options, TrainedOptions) and self.spec.options.features:
                raise OptionError(
                    f"/{self.name}.features", "works only with weights that are not sharded; leave it out"
                )
            self._check_halving()
        self._begin_average()
        if self.world.leads and (self.module.frozen or self.module.adapters is not None):
            from rlhf_core.models.freezing import trained_share

            log.info(f"the {self.name} trains {trained_share(self.module)}")

    def _begin_average(self) -> None:
        """Let a moving average begin at the weights as the strategy has placed them, sharded where they are."""
        if self.average is None:
            return
        if not self.average.follows(self.module, self.trainable.own_share):
            strategy = self.plan.config.names.get("strategy", "")
            raise OptionError(
                f"/{self.name}.ema",
                f"{self.average.decay:g}: the moving average needs weights between steps, which strategy "
                f"{strategy!r} does not keep; leave it out, or choose a strategy that keeps them (torch, deepspeed)",
            )
        self.average.begin(self.module, self.trainable.own_share)

    def _check_halving(self) -> None:
        """Refuse to halve batches where ranks wait for each other."""
        strategy = self.plan.config.names.get("strategy", "")
        if self.plan.config.on_oom == "halve" and self.world.size > 1:
            raise UsageError(
                f"{run_option('on_oom', 'halve')}: ranks of strategy {strategy!r} wait for each other inside a "
                "forward pass, so one rank without memory would block all; leave it out, and lower "
                f"{run_option('micro_tokens')}"
            )

    def bind_comparisons(self, roles: Mapping[str, LocalRole]) -> None:
        """Let outputs that compare with another role be computed: `<role>.<output>`, by the `compare` of the loss."""
        for _, term in self.spec.terms:
            for name in term.outputs:
                other, _ = split_output(name)
                if other:
                    _compare(self.module, name, roles[other].module, term.loss)

    # ------------------------------------------------------------------------------------------------------------------

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        """Return the outputs `names` of all rows: no gradient, on the CPU, zero where there is no completion.

        `source` names where the batch came from if this role is about to be trained on it.
        """
        while True:
            try:
                return self._infer(batch, names, source)
            except Exception as error:
                if not self.budget.halve(error):
                    raise
            self.forward_cache.clear()
            release_memory()  # not before the error, which holds what was computed, is gone

    def _infer(self, batch: Batch, names: frozenset[str], source: str) -> dict[str, Tensor]:
        """Return what `infer` returns, within the present token budget."""
        found: dict[str, Tensor] = {}
        cuts = micro_rows(batch, self.budget.tokens, padding=bearable_padding(self.module))
        later = self._later_outputs(source) if len(cuts) == 1 else frozenset()
        with torch.enable_grad() if later else torch.inference_mode():
            rounds, kept = len(cuts), False
            if self.trainable.sharded:
                rounds, kept = joint_rounds(batch, cuts, self.world)
            for i in range(rounds):
                report(f"reading with the {self.name}", i, rounds)
                micro = micro_batch(batch, cuts, i, kept=kept)
                self.budget.record_attempt(micro)
                outputs = self.forward_cache.compute(self.trainable, micro, names | later)
                if later and not i:
                    self.forward_cache.add(micro, outputs)
                for rows, name in product(cuts[i : i + 1], names):
                    place(found, name, rows, outputs[name].detach().float().cpu(), batch.tokens_NT.shape)
        for name in names - found.keys():  # no rows at all
            found[name] = torch.zeros(shape_of(name, batch.tokens_NT.shape))
        return found

    def _later_outputs(self, source: str) -> frozenset[str]:
        """Return the outputs that training on `source` needs from the same pass; empty if it needs a separate pass."""
        options = self.spec.options
        if not (source and self.plan.single_update and self.trainable.keeps_graphs):
            return frozenset()
        if (
            isinstance(options, TrainedOptions) and options.lora.rank and options.lora.dropout
        ):  # then training computes something else
            return frozenset()
        return frozenset[str]().union(*(term.outputs for _, term in self.spec.terms if term.source == source))

    def train(self, work: Mapping[str, Batch]) -> dict[str, float]:
        """`update_epochs` passes of `minibatches` optimizer steps over the credited batches, by credit key."""
        config = self.plan.config
        step = OptimizerStep(self.plan, self.spec, self.trainable, self.budget, self.forward_cache, self.version)
        means = Means()
        options = self.spec.options
        noisy = isinstance(options, TrainedOptions) and options.lora.rank > 0 and options.lora.dropout > 0
        if config.on_nonfinite == "skip":
            means.add_sum(f"skipped/{self.name}", 0.0)
        keys = [key for key in dict(self.spec.terms) if key in work]  # others are of terms that rest in this step
        read = {key: work[key].read_by(self.name, self.plan.credits[key].source) for key in keys}
        epochs = range(self.version, self.version + config.update_epochs * config.minibatches, config.minibatches)
        minibatches = Minibatches(
            read, config.minibatches, [(config.seed << 32) + version for version in epochs], self.world
        )
        for minibatch, sizes in zip(minibatches, step.measure(minibatches), strict=True):
            compare = self.version == step.version and not noisy
            step.run(minibatch, sizes, means, compare)
            self.forward_cache.clear()
            self.version += 1
        metrics = means.reduce(self.world, self._names)
        if config.on_mismatch == "warn":
            report_mismatch(metrics, config, self.spec, self.world)
        return metrics

    # ------------------------------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names."""
        return self.trainable.weights()

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names, without adapters."""
        with self.module.without_adapters() if self.module.adapters is not None else nullcontext():
            yield from self.trainable.weights()

    def save_adapters(self, folder: str) -> bool:
        """Write the adapters to a folder as PEFT reads them; return False if there are none."""
        if self.module.adapters is None:
            return False
        own = self.module.own_weights(self.trainable.full)
        tensors = {name.removeprefix("model."): tensor for name, tensor in own.items()}
        self.module.adapters.save(Path(folder), self.spec.options.model, tensors)
        return True

    def gathered(self) -> AbstractContextManager[None]:
        """While it is open, the module holds full weights, and each rank may use it independently."""
        return self.trainable.gathered()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], decay: float = 0.0) -> None:
        """Take all weights of a role of the same architecture; see `Role.load_weights`. Every rank calls it."""
        self.take_weights(weights, decay).check_complete()

    def take_weights(
        self, weights: Iterable[tuple[str, Tensor]], decay: float = 0.0, taken: TakenWeights | None = None
    ) -> TakenWeights:
        """Take some of the weights; return what has been taken, `taken` included, so that a whole may come in parts."""
        taken = taken or TakenWeights(self.name, self.trainable, self.module)
        taken.add(weights, decay)
        return taken

    def save(self, folder: str) -> None:
        """Checkpoint state: model, optimizer, schedule; of a role that tracks another one, its weights."""
        if self.spec.tracking is None:
            self.trainable.save(folder)
        else:
            self._snapshot_weights()(folder)

    def snapshot(self) -> Callable[[str], None] | None:
        """A copy of what `save` would write, as what writes it; None where the strategy takes none (see `Trainable`)."""
        if self.spec.tracking is None:
            return self.trainable.snapshot()
        return self._snapshot_weights()

    def _snapshot_weights(self) -> Callable[[str], None]:
        return snapshot_weights(self.weights(), self.world.leads)

    def load(self, folder: str) -> None:
        """Restore what `save` wrote."""
        if self.spec.tracking is None:
            self.trainable.load(folder)
        else:
            self.load_weights(read_weights(folder, self.name))

    def sleep(self) -> int:
        """Move all states to host memory, and give the allocator's cache back; passes kept for training are dropped.

        Returns:
            the bytes that the device has again; on a CPU, where nothing moves, those of the states.
        """
        self.forward_cache.clear()
        held, before = self.trainable.held_bytes, allocated_bytes()
        self.trainable.offload()
        release_memory()
        return held if before is None else before - (allocated_bytes() or 0)

    def wake(self) -> int:
        """Move the states back; returns their bytes, as `sleep` does."""
        before = allocated_bytes()
        self.trainable.reload()
        return self.trainable.held_bytes if before is None else (allocated_bytes() or 0) - before

    def export(self, folder: str) -> None:
        """Write a Hugging Face folder: model, tokenizer, template, generation config, model card. Every rank takes part.

        A moving average of the weights goes to `FOLDER-ema`, or takes their place, according to the role's options.
        """
        instead = self.average is not None and self.spec.options.ema_export == "model"  # type: ignore[attr-defined]
        if not instead:
            self._export(folder)
        if self.average is not None:
            self._export(folder if instead else f"{folder}-ema", averaged=True)

    def _export(self, folder: str, averaged: bool = False) -> None:
        """Write the weights that the module has now, or their moving average, a file at a time."""
        from rlhf_core.models.export.folder import export
        from rlhf_core.models.export.precision import fitting_dtype, saved_dtype

        options = self.spec.options
        own = self.module.own_weights(self.trainable.full, self.trainable.join_shares if averaged else None)
        dtype = fitting_dtype(
            self._weights_to_export(averaged), saved_dtype(self.plan.config.export_dtype, options.model, options)
        )
        weights = iter(self._weights_to_export(averaged))
        try:
            if self.world.leads:
                names = self.plan.config.names
                card: dict[str, Any] = {"base": options.model, "algorithm": names.get("algorithm", "")}
                shard = self.plan.config.export_shard
                how: dict[str, Any] = {"shard": shard, "dtype": dtype, "template": self.spec.template}
                export(self.module, self.tokenizer, folder, state=weights, own=own, **how, **card)
        finally:
            for _ in weights:  # gathered by all ranks together, also for one that cannot write
                pass
        self.world.barrier()

    def _weights_to_export(self, averaged: bool) -> Iterable[tuple[str, Tensor]]:
        """Return the whole weights of the model, or their averages; none with adapters, whose model is where it came from."""
        if self.module.adapters is not None:
            return ()
        if averaged:
            exported: Iterable[tuple[str, Tensor]] = self.module.hf_weights(
                self.trainable.full, self.trainable.join_shares
            )
            return exported
        return self.weights()


def _without_adapters(spec: RoleSpec) -> RoleSpec:
    """The spec of a copy that takes merged weights: without adapters."""
    if not isinstance(spec.options, TrainedOptions):
        return spec
    plain = replace(spec.options, lora=Lora(), quantize="none", freeze=(), ema=0.0)
    return replace(spec, options=plain)


def _compare(module: Any, name: str, other: Any, loss: Any) -> None:
    """Let `module` give the output `name`; models are imported only when there is one."""
    from rlhf_core.models.heads.compare import Comparison

    if module.comparisons.setdefault(name, Comparison(other, loss.compare)).function != loss.compare:
        raise ContractError(f"two losses define different functions as {name!r}; rename one of them")


def _build(spec: RoleSpec, saved: bool, **options: Any) -> Any:
    """Return the role's module; one that is saved at the end is tried out. Models are imported only when one is built."""
    from rlhf_core.models.build import build_module
    from rlhf_core.models.export.dry_save import check_saving

    module = build_module(spec, **options)
    if saved and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):  # as transformers saves
        check_saving(spec.name, module, spec.options, spec.template)
    return module
