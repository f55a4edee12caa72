"""Going on with a run: the newest checkpoint that is whole.

A damaged checkpoint is named and set aside as `damaged-step-N`, so that the run can write that step again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.engine_states import read_states
from rlhf_core.checkpoint.manifest import find_damage, list_checkpoints
from rlhf_core.checkpoint.own_files import read_own_files
from rlhf_core.errors import UsageError, run_option
from rlhf_core.util.messages import log
from rlhf_core.util.random_states import set_random_states
from rlhf_core.util.tensor_tree import read_tree

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.roles import Role

__all__ = ["restore"]


def restore(
    output: Path, strategy: str, by_parameter: bool, roles: Mapping[str, Role], world: World
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Load the newest valid checkpoint into `roles`, and the random states; return its state. Report what was damaged.

    A strategy that reads states `by_parameter` reads those of others that do.

    Returns:
        the plain data that was saved, and the states of this rank's engines by place; None if no checkpoint was written.

    Raises:
        UsageError: there are checkpoints, but each is damaged, another strategy wrote them, or the states of engines are
            of another number of ranks and differ.
    """
    found = world.gather(_newest_valid(output) if world.rank == 0 else None)[0]  # one rank looks, for all
    if isinstance(found, str):
        raise UsageError(found)
    if found is None:
        return None
    state: dict[str, Any] = json.loads((found / "state.json").read_text(encoding="utf-8"))
    if state["strategy"] != strategy and not (by_parameter and state.get("by_parameter", False)):
        raise UsageError(
            f"{found} was written by strategy {state['strategy']}, which {strategy} cannot read; resume with "
            f"strategy {state['strategy']}"
        )
    states = read_tree(found / "random.safetensors")
    engine_states = read_states(found, len(states), world.rank, world.size)
    for name, role in roles.items():
        role.load(str(found / "roles" / name))
    set_random_states(states[min(world.rank, len(states) - 1)])  # a rank that was not there continues as the last one
    return state, engine_states


def _newest_valid(output: Path) -> Path | str | None:
    """The newest undamaged checkpoint, None if there is none at all, and the error if all are damaged or one is foreign.

    Damaged ones that are newer are named and set aside, once an older one is found to continue from.
    """
    damages: list[tuple[Path, str]] = []
    own = read_own_files(output)
    for folder in reversed(list_checkpoints(output)):
        owner = read_own_files(folder)
        if own is not None and owner is not None and owner.run != own.run:
            return f"{folder} was not written by the run in {output}; move it away"
        if folder.is_symlink():
            return f"{folder} is a link; replace it by the folder itself, or move the link away"
        found = find_damage(folder)
        if found:
            damages.append((folder, found))
            continue
        for broken, what in damages:
            aside = _free_name(broken.with_name(f"damaged-{broken.name}"))
            broken.rename(aside)
            log.warning(f"{broken} is damaged ({what}) and renamed to {aside.name}; using {folder.name}")
        return folder
    if damages:
        listed = "; ".join(f"{folder.name}: {what}" for folder, what in damages)
        another = f"start over with another {run_option('output')}"
        return f"every checkpoint in {output / 'checkpoints'} is damaged ({listed}); {another}"
    return None


def _free_name(path: Path) -> Path:
    """`path`, or with a number after it, such that nothing has that name."""
    numbered = (path.with_name(f"{path.name}-{k}") for k in count(2))
    return next(each for each in chain([path], numbered) if not os.path.lexists(each))
