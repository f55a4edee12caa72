"""A PPO run with a reward that remembers, cut in its third step, in a folder full of files that are not its own.

`begin` makes it, and the undisturbed one to compare with; `resume` continues it; `left_by` is what must be equal. What
happens to it in between is in `test_faults` (its files) and `test_faults_around` (its rights, its process, its neighbors).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from counting_reward import Counting

from rlhf_core import Run, make_config
from rlhf_core.contract.hooks import hookimpl
from rlhf_core.errors import RunStopped, UsageError
from rlhf_core.plugins.registry import Registry

STEPS = 3
NOBODY = 65534
OUTPUT = Path("run")
ROWS = [{"prompt": word} for word in ("alpha", "be", "gamma ray", "d", "epsilon", "zeta zeta")]
TRAPS = {
    "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "notes.txt": "mine",
    ".hidden/notes": "mine",
    "metrics.jsonl.bak": "mine",
    ".config.toml.tmp.bak": "mine",
    "model-old/model.safetensors": "mine",
    "checkpoints-old/step-1/state.json": "mine",
    "data/step-2/rows": "mine",
}
"""Files of the user in the run's folder; the first is the data that the run reads."""
LATER_TRAPS = {
    "checkpoints/step-notes/notes": "mine",
    "checkpoints/.step-mine/notes": "mine",
    "checkpoints/damaged-step-2/notes": "mine",
    "model/notes": "mine",
}
"""More of them, put there while the run was cut; the last is refused where the run would write it."""
TOLD_OF_TIME = ("time/", "speed/", "memory/")


def options(**more: Any) -> dict[str, Any]:
    data = {"use": "json", "path": str(OUTPUT / "train.jsonl"), "heldout": 0.4, "encoding": {"template": "raw"}}
    small = {
        "model": "tiny:hidden=8,layers=1",
        "batch_size": 2,
        "minibatches": 1,
        "steps": STEPS,
        "save_every": 1,
        "keep": 3,
    }
    small |= {"sampling": {"n": 1, "max_new_tokens": 2}, "evaluator": "heldout", "eval_every": 1}
    return {"algorithm": "ppo", "data": data, "reward": Counting(), "output": str(OUTPUT), **small, **more}


class Cut:
    """Ends the run in the middle of its third step, as if it had been killed there."""

    @hookimpl
    def rlhf_before_update(self, run: Run) -> None:
        if run.step == STEPS - 1:
            raise KeyboardInterrupt


@contextmanager
def begin() -> Iterator[Path]:
    """Yield a folder with two working folders that everybody may enter: `whole` with the undisturbed run, `begun` with the
    one that was cut."""
    root = Path(tempfile.mkdtemp(prefix="rlhf-faults-"))
    root.chmod(0o755)
    before = Path.cwd()
    try:
        for name in ("whole", "begun"):
            (root / name).mkdir()
            os.chdir(root / name)
            write_files(TRAPS)
            if name == "whole":
                Run(make_config(**options())).train()
                continue
            registry = Registry()
            registry.register(Cut(), "cut")
            with pytest.raises(KeyboardInterrupt):
                Run(make_config(**options()), registry).train()
        if os.geteuid() == 0:
            with copied(root):
                assert resume() == End(0)  # everything is imported now: the interpreter may be root's alone
        yield root
    finally:
        os.chdir(before)
        shutil.rmtree(root)


@contextmanager
def copied(runs: Path, name: str = "copy") -> Iterator[Path]:
    """Work in a copy of the run that was cut."""
    folder, before = runs / name, Path.cwd()
    shutil.copytree(runs / "begun", folder, symlinks=True)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def write_files(files: dict[str, str]) -> None:
    for name, content in files.items():
        path = OUTPUT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def checksums(names: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256((OUTPUT / name).read_bytes()).hexdigest() for name in names}


@dataclass
class End:
    """End of an attempt."""

    code: int
    message: str = ""


def resume(**more: Any) -> End:
    """Continue the run; any other end than a finished run or a line of ours is raised."""
    try:
        Run(make_config(**options(resume=True, **more))).train()
    except UsageError as error:
        return End(2, str(error))
    except RunStopped as error:
        return End(error.exit_code, str(error))
    return End(0)


def left_by(folder: Path, without: str = "") -> dict[str, Any]:
    """Return the files of a run without times, except one file."""
    left: dict[str, Any] = {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("model/*.safetensors"))
    }
    assert left
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "evaluation-metrics.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        left[name] = [{k: v for k, v in row.items() if not k.startswith(TOLD_OF_TIME)} for row in rows]
    if without in left:
        assert left[without][-1]["step"] == STEPS
        del left[without]
    return left


@contextmanager
def as_user(user: str, give: bool = True) -> Iterator[None]:
    """While the block runs, files are opened with the rights of another user, unless it is `me`.

    The run's files are given to that user, but of what is not the run's only the rows that it reads: the rest is root's alone.
    """
    if user == "me":
        yield
        return
    if give:
        give_files()
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def give_files() -> None:
    """Give the run to another user, and close what is not the run's."""
    for path in (Path(), *Path().rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    for name in [*TRAPS][1:]:
        os.chown(OUTPUT / name, 0, 0)
        (OUTPUT / name).chmod(0o600)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "notes").write_text("mine")


def link_instead(path: Path) -> None:
    """To a file of the user, which must not be written through it."""
    path.unlink()
    path.symlink_to((OUTPUT / "notes.txt").resolve())


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncated,
    "zeroed": zeroed,
    "flipped": flipped,
    "removed": Path.unlink,
    "a folder": folder_instead,
    "a link": link_instead,
}
LOGS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "evaluation-metrics.jsonl")
NEWEST = "checkpoints/step-2"
CHECKPOINT = [
    f"{NEWEST}/{name}"
    for name in (
        "manifest.json",
        "run.json",
        "state.json",
        "random.safetensors",
        "providers/rank-0/reward.safetensors",
        *(f"roles/{role}/{part}.safetensors" for role in ("actor", "critic") for part in ("module", "optimizer")),
    )
]
FILES = [*CHECKPOINT, "config.toml", "run.json", *LOGS]
TABLE = [(name, damage) for name in FILES for damage in DAMAGES]


def refused_until_mended(name: str, damage: str) -> bool:
    """True if nobody but the user can tell what is right; all else the run mends itself."""
    if name in LOGS:
        return damage in ("a folder", "a link")
    return (name == "config.toml" and damage != "removed") or (name == "run.json" and damage == "a folder")
