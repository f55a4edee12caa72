"""Memory of a role under ZeRO, for `rlhf-run plan` (Rajbhandari et al. 2020, section 5), with the buffers of DeepSpeed 0.19.

With P parameters of which P_t are trained, R ranks, and e bytes of a weight that the module computes on, 2 in bfloat16 and 4 in
float32. From stage 1 on there is a float32 copy of everything trained, in float32 too, since the stages work on a flat copy of
their share. S is the optimizer's state of a whole copy, B the numbers of a bucket (`bucket`), f those of one that is reduced,
min(B, P_t), and A what a training pass holds.

    part             stage 0   stage 1                stage 2                   stage 3
    weights          4 P       e P                    e P                       e P / R
    optimizer state  S         (S + 4 P_t) / R        (S + 4 P_t) / R           (S + 4 P_t) / R
    gradients        4 P_t     4 P_t                  4 P_t / R                 4 P_t / R, always
    always           nothing   nothing                nothing                   e B
    a training pass  A         A + 4 B                A + 2 e B, + e f          A + e (live + ahead), + e f
    a reduction      4 P_t     4 B, or 4 P_t / R      2 e B + e f               in the pass

A bucket has B numbers, however few are trained. At stage 2 it is there twice if communication overlaps. If all gradients fit
into it (P_t <= B), stages 2 and 3 reduce them after the pass, and stage 2 has no others before. Else a pass has the last row's
`e f` too. Stage 0 reduces at most 500 million numbers in a call.

Stage 1 in bfloat16 has another optimizer: it always holds 4 P_t of float32 gradients, and e P_t gradients in the pass. Reducing
them takes a copy of both, where P_t is at most 500 million.

Stage 3 runs ahead and gathers up to 10^9 numbers (`stage3_max_live_parameters`), so the whole of a smaller model: `live` is
that number or a layer. It is the same without gradient checkpointing, since linear layers keep no gathered weight
(`releasing`). `ahead` is the buffer that the next B numbers, or a layer, are gathered in. A sampler in the process gathers e P.
With `--strategy.hpz N` a trained role has e P / N more, of the copy that N ranks hold together.

With `--strategy.offload optimizer` the optimizer state and the sums of gradients are in main memory. What stays on the device
are the gradients that are reduced: at stage 1 all, at stage 2 the share in bfloat16. With `all` the weights of stage 3 are in
main memory, too. Main memory then holds, on each rank,

    stage 1          stage 2 in bfloat16   stage 2 in float32   stage 3
    (16 + e) P_t/R   (16 + e) P_t/R        (20 + e) P_t/R       20 P_t/R, and e P/R with `all`

With `--strategy.sequence N` a rank has 1 / N of the tokens of each row, so A / N. With `--strategy.tensor N` P and P_t are what
a rank has of the model: embeddings and heads, and 1 / N of the layers. R is the number of groups of N ranks then. Activations
are counted for whole layers, which is more than a rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_strategy_deepspeed.config import zero_settings

if TYPE_CHECKING:
    from rlhf_core.contract.memory import ModelSize, RoleMemory
    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["REDUCED", "zero_memory"]

REDUCED = 500_000_000
"""Numbers that DeepSpeed reduces in one call at stage 0, and at stage 1 in bfloat16."""

LIVE = 1_000_000_000
"""Numbers that stage 3 holds gathered at a time, where a file names no other (`stage3_max_live_parameters`)."""


def zero_memory(whole: RoleMemory, size: ModelSize, ranks: int, options: DeepSpeedOptions) -> RoleMemory:
    """Return what one of `ranks` devices holds of a role, of which `whole` is a whole copy.

    Raises:
        UsageError: the file of `config` cannot be read.
    """
    if options.tensor > 1:
        whole, size, ranks = *_cut_layers(whole, size, options.tensor), max(1, ranks // options.tensor)
    if options.sequence > 1:
        whole = _cut_rows(whole, options.sequence)
    zero = zero_settings(options)
    share = _Share(
        whole,
        size,
        ranks,
        bucket=int(zero["reduce_bucket_size"]),
        buckets=2 if zero["overlap_comm"] else 1,
        fetched=int(zero.get("stage3_prefetch_bucket_size", 0)),
        live=int(zero.get("stage3_max_live_parameters", LIVE)),
        node=int(options.hpz or zero.get("zero_hpz_partition_size", 1)) if options.offload != "all" else 1,
        offloads=options.offload != "none",
    )
    if not size.trained:
        held = share.frozen_role() if options.stage == 3 and ranks > 1 else whole
    else:
        held = (share.stage_0, share.stage_1, share.stage_2, share.stage_3)[options.stage]()
    return replace(held, weights=0) if options.offload == "all" else held


def _cut_layers(whole: RoleMemory, size: ModelSize, tensor: int) -> tuple[RoleMemory, ModelSize]:
    """Return the memory and size of a role of whose layers a rank holds 1 / `tensor`; what is trained shrinks like the rest."""
    held = size.root + -(-(size.parameters - size.root) // tensor)

    def share(whole: int) -> int:
        return whole * held // size.parameters

    parts = {name: share(getattr(whole, name)) for name in ("weights", "gradients", "optimizer", "overlap", "update")}
    less = replace(size, parameters=held, trained=share(size.trained), layer=-(-size.layer // tensor))
    return replace(whole, **parts), less


def _cut_rows(whole: RoleMemory, ranks: int) -> RoleMemory:
    """Return the memory of a role of whose rows a rank computes 1 / `ranks` of the tokens."""
    activations, inference = whole.activations // ranks, whole.inference // ranks
    return replace(whole, activations=activations, inference=inference, overlap=min(whole.overlap, activations))


@dataclass(frozen=True)
class _Share:
    """The share of one device, under each stage."""

    whole: RoleMemory
    size: ModelSize
    ranks: int
    bucket: int
    """numbers that are reduced in one call"""
    buckets: int
    """buckets of stage 2"""
    fetched: int
    """numbers that stage 3 gathers ahead"""
    live: int
    """numbers that stage 3 holds gathered at a time, as it runs ahead"""
    node: int
    """ranks that hold a second copy of the weights together; 1 without one"""
    offloads: bool
    """optimizer states are in main memory"""

    @property
    def narrow(self) -> bool:
        """True if the module computes on weights of two bytes."""
        return self.size.compute_bytes < 4

    @property
    def sums(self) -> int:
        """Bytes of float32 gradients of all that is trained."""
        return 4 * self.size.trained

    @property
    def fits(self) -> bool:
        """True if all gradients are in one bucket."""
        return self.size.trained <= self.bucket

    @property
    def optimizer(self) -> int:
        """Bytes of the states and the float32 copy."""
        return 0 if self.offloads else (self.whole.optimizer + self.sums) // self.ranks

    def stage_0(self) -> RoleMemory:
        """Nothing is sharded; gradients are flattened to be reduced."""
        return replace(self.whole, update=max(self.whole.update, min(4 * REDUCED, self.sums)))

    def stage_1(self) -> RoleMemory:
        """Optimizer states are sharded; gradients are reduced after the last backward pass."""
        whole, trained, e = self.whole, self.size.trained, self.size.compute_bytes
        if self.narrow and not self.offloads:
            copies = (self.sums if trained <= REDUCED else 0) + e * trained
            update = max(copies, whole.update // self.ranks)
            return replace(whole, optimizer=self.optimizer, buffers=whole.buffers + self.sums, update=update)
        owned = 0 if self.offloads and not self.narrow else self.sums // self.ranks
        reduction = 4 * self.bucket if self.fits else owned
        if self.narrow:
            reduction = (
                owned + e * min(trained, self.bucket) + 4 * (self.bucket if self.fits else min(trained, self.bucket))
            )
        step = 0 if self.offloads else 2 * self.sums // self.ranks + whole.update // self.ranks - self.sums
        return replace(
            whole,
            gradients=self.sums,
            optimizer=self.optimizer,
            activations=whole.activations + 4 * self.bucket,
            update=max(reduction, step),
        )

    def stage_2(self) -> RoleMemory:
        """Gradients are sharded, too: they are reduced from buckets while the backward pass runs."""
        whole, e = self.whole, self.size.compute_bytes
        staging = self.buckets * e * self.bucket
        flat = e * min(self.bucket, self.size.trained)
        owned = 0 if self.offloads and not self.narrow else self.sums // self.ranks
        several = not whole.overlap  # micro-batches: there are gradients of those before
        wide = not self.narrow and not self.offloads
        again = (
            owned if several and wide else 0
        )  # a float32 sum and what is added to it; narrow ones are added in place
        late = self.fits and not several
        reduction = staging + max(flat, again) - (owned if late and not self.narrow else 0)
        copied = 0 if self.narrow else owned  # narrow ones are in one piece already
        step = 0 if self.offloads else copied + whole.update // self.ranks
        return replace(
            whole,
            gradients=owned,
            optimizer=self.optimizer,
            activations=whole.activations + staging + (0 if self.fits else flat + again),
            overlap=owned if late else 0,
            update=max(reduction, step),
        )

    def stage_3(self) -> RoleMemory:
        """Weights are sharded, too, and gathered; the sums of gradients and a bucket are always there."""
        sharded = self.frozen_role()
        sums = 0 if self.offloads else self.sums // self.ranks
        e = self.size.compute_bytes
        second = e * self.size.parameters // self.node if self.node > 1 else 0
        return replace(
            sharded,
            gradients=sums,
            optimizer=self.optimizer,
            overlap=sums,
            update=self.whole.update // self.ranks,
            buffers=sharded.buffers + e * self.bucket + sums + second,
        )

    def frozen_role(self) -> RoleMemory:
        """Weights are sharded, and gathered for each pass."""
        whole, size, e = self.whole, self.size, self.size.compute_bytes
        ahead = min(size.parameters, max(self.fetched, size.layer))
        live = min(size.parameters, max(self.live, size.layer))
        flat = 0 if self.fits else e * self.bucket
        return replace(
            whole,
            weights=whole.weights // self.ranks,
            activations=whole.activations + e * (live + ahead) + flat if size.trained else 0,
            inference=whole.inference + e * (live + ahead),
            gathered=e * size.parameters,
        )
