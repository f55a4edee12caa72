"""Writing a checkpoint: in the loop, every rank its part; or beside it, from a copy in memory.

Either way under a temporary name, forced to the disk, renamed. Whatever a role saves is covered, since the role does it: by
`save`, or by `snapshot` where its strategy has one (see `Trainable`), which then holds all that `save` would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.checkpoint.manifest import seal
from rlhf_core.checkpoint.random_states import get_random_states
from rlhf_core.checkpoint.rotation import read_rotation, rotate
from rlhf_core.util.atomic_files import force, fresh_folder, temporary_name, write_text
from rlhf_core.util.tensor_tree import write_tree

if TYPE_CHECKING:
    from rlhf_core.run.run import Run

__all__ = ["finish_background_save", "save"]

Writer = Callable[[str], None]


def save(run: Run) -> None:
    """Write OUTPUT/checkpoints/step-N if it is not there, then remove what is not kept. Every rank takes part.

    With `--save-async`, and a strategy that can, it is only begun: `settle` says when it is done.
    """
    _note(run, run.saving.wait())  # one at a time
    folder = run.output / "checkpoints" / f"step-{run.step}"
    if run.world.gather(folder.exists())[0]:  # the leader's word: others may not see yet what it has just renamed
        rotate(run)  # a run may have been killed between saving and this
        return
    rest = SharedState(_state(run), run.world.gather(get_random_states()), run.output)
    writers = _snapshots(run) if run.config.save_async else None
    if writers is None:
        _write_together(run, folder, rest)
        rotate(run)
    elif run.leader:
        run.saving.start(partial(_write_copies, folder, writers, rest, read_rotation(run)))


def finish_background_save(run: Run, wait: bool) -> None:
    """Take note of a save that went on beside the loop, if it is done; with `wait`, wait for that. Raises what it raised."""
    with run.phase("checkpoint"):
        _note(run, run.saving.wait() if wait else run.saving.poll())


def _note(run: Run, seconds: float) -> None:
    if seconds:
        run.add_seconds("checkpoint_background", seconds)


@dataclass(frozen=True)
class SharedState:
    """All of a checkpoint that is no role's."""

    state: Mapping[str, Any]
    random_states: list[Any]
    output: Path

    def write(self, folder: Path) -> None:
        """Write it, and the manifest of everything in `folder`."""
        write_tree(folder / "random.safetensors", self.random_states)
        write_text(folder / "state.json", json.dumps(self.state, indent=1))
        seal(folder)
        for log in self.output.glob("*.jsonl"):  # lines up to this step must not be lost when it is not
            force(log)


def _state(run: Run) -> dict[str, Any]:
    return {
        "step": run.step,
        "stream": run.stream.state_dict(),
        "kl_coef": run.kl_coef,
        "moments": {source: moments.state() for source, moments in run.moments.items()},
        "versions": {name: run.roles[name].version for name in run.plan.trained},
        "metrics": dict(run.last_metrics),
        "evaluations": list(run.evaluations),
        "strategy": run.config.names.get("strategy", ""),
    }


def _snapshots(run: Run) -> dict[str, Writer] | None:
    """A copy of every trained role as what writes it; None if one of them cannot be copied."""
    writers: dict[str, Writer] = {}
    for name in run.plan.trained:
        snapshot: Callable[[], Writer | None] | None = getattr(run.roles[name], "snapshot", None)
        writer = snapshot() if snapshot is not None else None
        if writer is None:
            return None
        writers[name] = writer
    return writers


def _write_together(run: Run, folder: Path, rest: SharedState) -> None:
    """Every rank writes its part into a folder that the leader opens and closes."""
    with fresh_folder(folder) if run.leader else nullcontext(temporary_name(folder)) as temporary:
        run.world.barrier()  # the folder is there
        for name in run.plan.trained:
            run.roles[name].save(_role_folder(temporary, name))
        run.world.barrier()  # every rank has saved
        if run.leader:
            rest.write(temporary)
    run.world.barrier()  # nobody stops, or looks for it, before it has its name


def _write_copies(
    folder: Path, writers: Mapping[str, Writer], rest: SharedState, rotation: Callable[[Path], None]
) -> None:
    """The same from copies, by the leader alone and in another thread: nothing here may use the run or its ranks."""
    with fresh_folder(folder) as temporary:
        for name, write in writers.items():
            write(_role_folder(temporary, name))
        rest.write(temporary)
    rotation(rest.output)


def _role_folder(folder: Path, name: str) -> str:
    path = folder / "roles" / name
    path.mkdir(parents=True, exist_ok=True)
    return str(path)
