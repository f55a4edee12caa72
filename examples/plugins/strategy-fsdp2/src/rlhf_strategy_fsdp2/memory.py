"""Memory of a role under FSDP2, for `rlhf-run plan`.

With P parameters of which P_t are trained, R ranks, and e bytes of a weight that the module computes on. `layer` and `root` are
the numbers of a layer's unit and of the root unit, and t = P_t / P.

    part             bytes on a rank
    weights          whole / R; float32 where they are trained
    gradients        4 P_t / R
    optimizer state  S / R
    in a layer       e root (1 + t) + (3 e + 4 t) layer
    at the end       e root (1 + t) + 4 t root
    sampling         e (P + layer)

S is the optimizer's state of a whole copy. In a layer's backward pass there are the weights of this unit twice, as parameters
and as the buffer that they were gathered in, those of the next unit, and the float32 gradients of the unit before, which are
being reduced. Then two units have no reduced gradients yet: this one and the next. Without `reshard` all layers' weights stay
in place of the three. Activations are not shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_core import ModelSize, RoleMemory

__all__ = ["sharded_memory"]


def sharded_memory(whole: RoleMemory, size: ModelSize, ranks: int, reshard: bool) -> RoleMemory:
    """Return what one of `ranks` devices holds of a role, of which `whole` is a whole copy."""
    e, share = size.compute_bytes, size.trained / max(1, size.parameters)
    adapted = size.trained < size.parameters
    masters = whole.weights if adapted else whole.weights + (4 - e) * size.trained
    root = int(e * size.root * (1 + share))
    layers = 3 * e * size.layer if reshard else e * (size.parameters - size.root + size.layer)
    late = int(8 * size.layer * share) if size.layers > 1 else 0
    reduced = int(4 * size.root * share)
    return replace(
        whole,
        weights=0 if size.shares_base else masters // ranks,
        gradients=4 * size.trained // ranks,
        optimizer=whole.optimizer // ranks,
        activations=whole.activations + root + layers + int(4 * size.layer * share) if size.trained else 0,
        overlap=(whole.overlap + late) // ranks,
        update=max(whole.update // ranks, root + reduced) if size.trained else 0,
        inference=whole.inference + e * (size.root + 2 * size.layer),
        gathered=e * (size.parameters + size.layer),
    )
