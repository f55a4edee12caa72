"""Beginning a run or going on with one: the output folder, and the newest checkpoint that is whole.

A damaged checkpoint is named and set aside as `damaged-step-N`, so that the run can write that step again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.engine_states import read_states
from rlhf_core.checkpoint.manifest import find_damage, list_checkpoints
from rlhf_core.checkpoint.random_states import set_random_states
from rlhf_core.errors import OptionError, UsageError, run_option
from rlhf_core.util.atomic_files import check_links, write_text
from rlhf_core.util.messages import log
from rlhf_core.util.tensor_tree import read_tree

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.roles import Role

__all__ = ["prepare_output", "restore"]


def prepare_output(config: RunConfig) -> None:
    """Make the output folder and write the resolved configuration. Of several ranks, all look and the first writes.

    Raises:
        UsageError: the folder already holds a run and `--resume` was not given, or is not a folder; or `--resume` was
            given and there is no run (unless it is `auto`), or one with other options.
    """
    from rlhf_core.config.builder import to_toml
    from rlhf_core.config.resume import check_resume

    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise OptionError("/output", f"{output} is a file; name a folder")
    check_links(output)
    begun = any((output / name).exists() for name in ("metrics.jsonl", "checkpoints"))  # not: ended by a mistake
    if begun and not config.resume:
        raise UsageError(
            f"{output} already holds a run; add {run_option('resume', True)} to continue it, or name another "
            f"{run_option('output')}"
        )
    if config.resume is True or (config.resume == "auto" and begun):
        check_resume(config)
    if int(os.environ.get("RANK", "0")) > 0:  # no rank has joined the others yet
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        for leftover in (output / "checkpoints").glob(".step-*"):  # of a process killed while it saved
            rmtree(leftover)
        write_text(output / "config.toml", to_toml(replace(config, resume=False, resume_changed=False)))
    except OSError as error:
        raise UsageError(f"cannot write to {run_option('output')} {output}: {error.strerror}") from None


def restore(
    output: Path, strategy: str, roles: Mapping[str, Role], world: World
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Load the newest valid checkpoint into `roles`, and the random states; return its state. Report what was damaged.

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
    if state["strategy"] != strategy:
        raise UsageError(
            f"{found} was written by strategy {state['strategy']}, which {strategy} cannot read; resume with it"
        )
    states = read_tree(found / "random.safetensors")
    engine_states = read_states(found, len(states), world.rank, world.size)
    for name, role in roles.items():
        role.load(str(found / "roles" / name))
    set_random_states(states[min(world.rank, len(states) - 1)])  # a rank that was not there continues as the last one
    return state, engine_states


def _newest_valid(output: Path) -> Path | str | None:
    """The newest undamaged checkpoint, None if there is none at all, and what to say if all are damaged.

    Damaged ones that are newer are named and set aside, once an older one is found to go on from.
    """
    damages: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(output)):
        found = find_damage(folder)
        if found:
            damages.append((folder, found))
            continue
        for broken, what in damages:
            aside = broken.with_name(f"damaged-{broken.name}")
            rmtree(aside, ignore_errors=True)
            broken.rename(aside)
            log.warning(f"{broken} is damaged ({what}), now {aside.name}; using {folder.name}")
        return folder
    if damages:
        listed = "; ".join(f"{folder.name}: {what}" for folder, what in damages)
        another = f"begin again with another {run_option('output')}"
        return f"every checkpoint in {output / 'checkpoints'} is damaged ({listed}); {another}"
    return None
