"""The buffer of GCG: a few best suffixes, of which a step improves the best."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch
from rlhf_eval_gcg.attack.optimizer import Losses, Move, Suffix

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["fill_pool", "settle"]


def fill_pool(suffix: Suffix) -> Generator[Losses, Any, None]:
    """Fill the buffer at the first step: the given suffix, and random ones of single letters and signs, as in nanoGCG."""
    size, letters = suffix.options.buffer, suffix.letters_M
    if not size or "pool_KL" in suffix.memory:
        return
    current_L = suffix.ids_L.cpu()
    rows = [current_L]
    for _ in range(64 * size if len(letters) else 0):
        if len(rows) == size:
            break
        drawn_L = letters[torch.randint(len(letters), current_L.shape, generator=suffix.generator)]
        if bool(suffix.survivors(drawn_L[None])[0]):
            rows.append(drawn_L)
    pool_KL = torch.stack(rows).to(suffix.ids_L.device)
    losses_K = yield Losses(pool_KL)
    suffix.memory["pool_KL"], suffix.memory["pool_losses_K"] = pool_KL, losses_K


def settle(suffix: Suffix, ids_CL: Tensor, losses_C: Tensor) -> Move:
    """Return the move to the best candidate, or to the best of the buffer after the candidate has replaced the worst."""
    best = int(losses_C.argmin())
    size = suffix.options.buffer
    if not size:
        return Move(ids_CL[best], float(losses_C[best]))
    pool_KL, losses_K = suffix.memory["pool_KL"], suffix.memory["pool_losses_K"]
    if len(pool_KL) < size:
        pool_KL, losses_K = torch.cat([pool_KL, ids_CL[best][None]]), torch.cat([losses_K, losses_C[best][None]])
    elif losses_C[best] < losses_K.max():
        pool_KL, losses_K = pool_KL.clone(), losses_K.clone()
        worst = int(losses_K.argmax())
        pool_KL[worst], losses_K[worst] = ids_CL[best], losses_C[best]
    suffix.memory["pool_KL"], suffix.memory["pool_losses_K"] = pool_KL, losses_K
    first = int(losses_K.argmin())
    return Move(pool_KL[first].clone(), float(losses_K[first]))
