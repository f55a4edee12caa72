"""Ranks without rows, where a batch has fewer rows than there are ranks.

Such a rank takes part in every collective operation with nothing of its own. Its empty batch has the extras and metrics that
the batches of other ranks have: losses and credit ask for them by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_core.contract.batch import Batch
from rlhf_core.contract.results import ScoredRollouts

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World

__all__ = ["like_others"]

R = TypeVar("R", Batch, ScoredRollouts)


def like_others(rows: R, world: World) -> R:
    """Return `rows`; on a rank that has none, no rows of the form that they have on the first rank with some. Collective."""
    forms = world.gather(_form(rows) if len(rows) else None)
    if len(rows):
        return rows
    form: Any = next(form for form in forms if form is not None)
    if isinstance(rows, ScoredRollouts):
        own = rows.rollouts
        form = replace(form, rollouts=replace(form.rollouts, step=own.step, world=own.world), failed=rows.failed)
    else:
        form = replace(form, step=rows.step, world=rows.world)
    found: R = form
    return found


def _form(rows: Batch | ScoredRollouts) -> Any:
    """Return a batch without its rows and its process group."""
    if isinstance(rows, ScoredRollouts):
        bare = replace(rows, rollouts=replace(rows.rollouts, world=None))
        return bare.rows([])
    return replace(rows, world=None).rows([])
