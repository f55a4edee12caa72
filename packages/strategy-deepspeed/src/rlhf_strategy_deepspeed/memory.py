"""Memory of a role under ZeRO, for `rlhf-run plan` (Rajbhandari et al. 2020, section 5).

With P parameters of which P_t are trained, R ranks, and e bytes of a weight that the module computes on, 2 in bfloat16 and 4 in
float32. Everything trained has an additional float32 copy, in float32 too, where stages 1 to 3 work on a flat copy of
their share.

    part             stage 0     stage 1           stage 2                  stage 3
    weights          4 P         e P               e P                      e P / R
    gradients        4 P_t       4 P_t             4 P_t / R                4 P_t / R
    optimizer state  S           (S + 4 P_t) / R   (S + 4 P_t) / R          (S + 4 P_t) / R
    buffers          bucket      bucket            2 buckets, overlapped    gathered: e (root + 2 layers), 2 buckets

With `--strategy.offload optimizer` the optimizer state is in main memory, and so are the gradients' sums of stage 3; with `all`
the weights of stage 3, too.

With `--strategy.tensor N` P and P_t are what a rank has of the model: embeddings and heads, and 1 / N of the layers. R is the
number of groups of N ranks then. Activations are counted for whole layers, which is more than a rank holds.

S is the optimizer's state of a whole copy. A bucket holds 50 million numbers by default (`bucket`), 500 million
at stage 0, and at most P_t.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_core.contract.memory import ModelSize, RoleMemory
    from rlhf_strategy_deepspeed.options import DeepSpeedOptions

__all__ = ["BUCKET", "zero_memory"]

BUCKET = 50_000_000
"""Numbers that are reduced or gathered in one call, where the options name none."""

REDUCED = 500_000_000
"""Numbers that DeepSpeed reduces in one call at stage 0."""


def zero_memory(whole: RoleMemory, size: ModelSize, ranks: int, options: DeepSpeedOptions) -> RoleMemory:
    """Return what one of `ranks` devices holds of a role."""
    if options.tensor > 1:
        whole, size, ranks = *_cut_layers(whole, size, options.tensor), max(1, ranks // options.tensor)
    stage = options.stage
    if not size.trained:
        if stage < 3 or ranks == 1:
            return whole
        held = _frozen_memory(whole, size, ranks)
    else:
        held = _trained_memory(whole, size, ranks, stage, options.bucket)
        if options.offload != "none":
            held = replace(held, optimizer=0, gradients=0 if stage == 3 else held.gradients)
    return replace(held, weights=0) if options.offload == "all" else held


def _cut_layers(whole: RoleMemory, size: ModelSize, tensor: int) -> tuple[RoleMemory, ModelSize]:
    """Return the memory and size of a role of whose layers a rank holds 1 / `tensor`; what is trained shrinks like the rest."""
    held = size.root + -(-(size.parameters - size.root) // tensor)

    def share(whole: int) -> int:
        return whole * held // size.parameters

    parts = {name: share(getattr(whole, name)) for name in ("weights", "gradients", "optimizer", "overlap", "update")}
    less = replace(size, parameters=held, trained=share(size.trained), layer=-(-size.layer // tensor))
    return replace(whole, **parts), less


def _trained_memory(whole: RoleMemory, size: ModelSize, ranks: int, stage: int, bucket: int | None) -> RoleMemory:
    """Return the memory of a trained role without offload."""
    if not stage:
        return replace(whole, buffers=whole.buffers + 4 * min(REDUCED, size.trained))
    buffer = 4 * min(bucket or BUCKET, size.trained)
    sharded = replace(
        whole,
        gradients=4 * size.trained,
        optimizer=(whole.optimizer + 4 * size.trained) // ranks,
        buffers=whole.buffers + buffer,
    )
    if stage == 1:
        return sharded
    share = replace(
        sharded,
        gradients=4 * size.trained // ranks,
        overlap=sharded.overlap // ranks,
        buffers=whole.buffers + 2 * buffer,
    )
    if stage == 2:
        return share
    gathered = size.compute_bytes * (size.root + 2 * size.layer)
    return replace(share, weights=whole.weights // ranks, buffers=share.buffers + gathered)


def _frozen_memory(whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
    """Return the memory of a frozen role whose weights are sharded."""
    return replace(whole, weights=whole.weights // ranks, buffers=size.compute_bytes * (size.root + 2 * size.layer))
