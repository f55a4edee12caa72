"""Writing a checkpoint: in the loop, every rank its part; or in the background, from a copy in memory.

Either way under a temporary name, forced to the disk, renamed. Whatever a role saves is covered, since the role does it: by
`save`, or by `snapshot` where its strategy has one (see `Trainable`), which then holds all that `save` would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.engine_states import write_states
from rlhf_core.checkpoint.manifest import seal
from rlhf_core.checkpoint.own_files import OWN_FILES, own_checkpoints
from rlhf_core.errors import RunStopped
from rlhf_core.util.atomic_files import force, fresh_folder, temporary_name, write_text
from rlhf_core.util.random_states import get_random_states
from rlhf_core.util.tensor_tree import write_tree

if TYPE_CHECKING:
    from rlhf_core.checkpoint.background import Background
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.roles import Role

__all__ = ["SharedState", "save"]

Writer = Callable[[str], None]


@dataclass(frozen=True)
class SharedState:
    """All of a checkpoint that is no role's."""

    state: Mapping[str, Any]
    """plain data; `step` names the checkpoint"""
    output: Path
    """the folder of the run"""
    random_states: list[Any] = field(default_factory=list)
    """random states of every rank"""
    engine_states: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """states of engines by rank, then by place; of those ranks that do not write their own"""

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.output / "checkpoints" / f"step-{self.state['step']}"

    def write(self, folder: Path) -> None:
        """Write it, and the manifest of everything in `folder`."""
        write_tree(folder / "random.safetensors", self.random_states)
        for rank, states in self.engine_states.items():
            write_states(folder, rank, states)
        write_text(folder / "state.json", json.dumps(self.state, indent=1))
        copyfile(self.output / OWN_FILES, folder / OWN_FILES)
        seal(folder)
        for log in self.output.glob("*.jsonl"):  # lines up to this step must not be lost when it is not
            force(log)


def save(
    shared: SharedState,
    roles: Mapping[str, Role],
    engine_states: Callable[[], Mapping[str, Any]],
    world: World,
    rotate: Callable[[Path], None],
    background: Background | None = None,
) -> None:
    """Write the checkpoint unless it exists, then `rotate`. Every rank takes part.

    With `background`, and roles that can be copied, only the copy is made now and the leader writes it there.
    `engine_states` returns this rank's, which is not changed afterwards.
    """
    leader = world.leads
    if world.gather(shared.folder.exists())[0]:  # the leader's word: others may not see yet what it has just renamed
        if leader:
            if shared.folder not in own_checkpoints(shared.output):
                raise RunStopped(f"{shared.folder} is not a checkpoint of this run; move it away, then resume")
            rotate(shared.output)  # a run may have been killed between saving and this
        return
    shared = replace(shared, random_states=world.gather(get_random_states()))
    writers = _snapshots(roles) if background is not None else None
    if background is None or writers is None:
        _write_together(shared, roles, engine_states(), world)
        if leader:
            rotate(shared.output)
        return
    shared = replace(shared, engine_states=dict(enumerate(world.gather(engine_states()))))
    if leader:
        background.start(partial(_write_copies, shared, writers, rotate))


def _snapshots(roles: Mapping[str, Role]) -> dict[str, Writer] | None:
    """A copy of every trained role as what writes it; None if one of them cannot be copied."""
    writers: dict[str, Writer] = {}
    for name, role in roles.items():
        writer = role.snapshot()
        if writer is None:
            return None
        writers[name] = writer
    return writers


def _write_together(
    shared: SharedState, roles: Mapping[str, Role], engine_states: Mapping[str, Any], world: World
) -> None:
    """Write every rank's part into a folder that the leader opens and closes."""
    leader = world.leads
    with fresh_folder(shared.folder) if leader else nullcontext(temporary_name(shared.folder)) as temporary:
        world.barrier()  # the folder is there
        for name, role in roles.items():
            role.save(_role_folder(temporary, name))
        if world.first:
            write_states(temporary, world.rank, engine_states)
        world.barrier()  # every rank has saved
        if leader:
            shared.write(temporary)
    world.barrier()  # no rank stops, or looks for it, before it has its name


def _write_copies(shared: SharedState, writers: Mapping[str, Writer], rotate: Callable[[Path], None]) -> None:
    """Write copies, by the leader alone and in another thread: nothing here may use the roles or the ranks."""
    with fresh_folder(shared.folder) as temporary:
        for name, write in writers.items():
            write(_role_folder(temporary, name))
        shared.write(temporary)
    rotate(shared.output)


def _role_folder(folder: Path, name: str) -> str:
    path = folder / "roles" / name
    path.mkdir(parents=True, exist_ok=True)
    return str(path)
