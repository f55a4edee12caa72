"""What goes wrong around a run, row by row: the files of the user stay as they are, the end is one line with an exit code, and
the run that is resumed leaves what an undisturbed one leaves, bit for bit.

The run is PPO with a reward that remembers, cut in its third step; its folder is full of files that are not its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
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
from killed_child import train_until

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


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    """Two working folders that everybody may enter: `whole` with the undisturbed run, `begun` with the one that was cut."""
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
        yield root
    finally:
        os.chdir(before)
        shutil.rmtree(root)


@pytest.fixture
def begun(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the run that was cut, in the working folder."""
    folder = runs / "copy"
    shutil.copytree(runs / "begun", folder, symlinks=True)
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.undo()
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
    """How an attempt ended."""

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
    """What a run leaves that does not tell the time, less one file."""
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


# ----------------------------------------------------------------------------------------------------------------------
# every file of a checkpoint and of a run's folder
# ----------------------------------------------------------------------------------------------------------------------


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


def test_the_table_is_long_and_has_every_file_of_a_checkpoint(begun: Path) -> None:
    assert len(TABLE) >= 80
    found = {str(path.relative_to(OUTPUT)) for path in (OUTPUT / NEWEST).rglob("*") if path.is_file()}
    assert found == set(CHECKPOINT)


QUICK = ("config.toml", f"{NEWEST}/state.json")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
def test_a_file_that_was_damaged_in_any_way_is_mended_or_named_and_nothing_else_is_touched(
    name: str, runs: Path, begun: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = left_by(runs / "whole" / OUTPUT, name)
    for damage, act in DAMAGES.items():
        copy = runs / "row"
        shutil.copytree(begun, copy, symlinks=True)
        with monkeypatch.context() as patch:
            patch.chdir(copy)
            before = checksums(TRAPS)
            original = (OUTPUT / name).read_bytes()
            act(OUTPUT / name)
            capsys.readouterr()
            end = resume()
            said = capsys.readouterr().err
            assert end.code == (2 if refused_until_mended(name, damage) else 0), (damage, end)
            assert "\n" not in end.message
            if end.code:
                assert Path(name).name in end.message, (damage, end)
                path = OUTPUT / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.write_bytes(original)
                assert resume() == End(0), damage
            elif name in CHECKPOINT:
                assert f"{OUTPUT / NEWEST} is damaged ({name.removeprefix(f'{NEWEST}/')}" in said, damage
            elif damage in ("zeroed", "flipped") or (name, damage) == ("metrics.jsonl", "removed"):
                assert name in said, (damage, said)
            assert left_by(OUTPUT, name) == whole, damage
            assert checksums(TRAPS) == before, damage
        shutil.rmtree(copy)


def test_a_damaged_line_is_set_aside_as_it_was_and_the_lines_after_it_stay(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = OUTPUT / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"\x00" + first[1:] + second)
    assert resume() == End(0)
    assert f"{path}:1 is damaged; moved to metrics.jsonl.damaged" in capsys.readouterr().err
    assert (OUTPUT / "metrics.jsonl.damaged").read_bytes() == b"\x00" + first[1:]
    assert path.read_bytes().splitlines(keepends=True)[0] == second


def test_what_a_user_put_among_the_runs_files_is_left_alone_or_refused(runs: Path, begun: Path) -> None:
    write_files(LATER_TRAPS)
    truncated(OUTPUT / NEWEST / "state.json")  # is set aside under a name that is taken
    end = resume()
    assert end.code == 2 and end.message.startswith("run/model is there and no file of this run")
    shutil.move(OUTPUT / "model", OUTPUT / "model-of-mine")
    assert resume() == End(0)
    shutil.move(OUTPUT / "model-of-mine", OUTPUT / "mine")
    assert {name: (OUTPUT / name.replace("model/", "mine/")).read_text() for name in LATER_TRAPS} == LATER_TRAPS
    assert left_by(OUTPUT) == left_by(runs / "whole" / OUTPUT)


def test_a_checkpoint_of_another_run_is_refused_and_never_removed(runs: Path, begun: Path) -> None:
    other = OUTPUT / "checkpoints" / "step-9"
    shutil.copytree(runs / "whole" / OUTPUT / "checkpoints" / "step-3", other)
    end = resume(keep=1)
    assert (end.code, end.message) == (2, f"{other} was written by another run than the one in run; move it away")
    assert other.is_dir()


# ----------------------------------------------------------------------------------------------------------------------
# as somebody who is not root, and killed
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[None]:
    """While the block runs, files are opened with the rights of another user."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    "name", [*CHECKPOINT[2:4], "config.toml", "run.json", "metrics.jsonl", "checkpoints", NEWEST, "."]
)
def test_a_file_that_may_not_be_read_is_one_line_or_set_aside(
    name: str, runs: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.executable", shutil.which("true")
    )  # the watch over stops: the interpreter may be root's alone
    assert resume() == End(0)  # everything is imported: the interpreter may be root's alone
    shutil.rmtree(begun)
    shutil.copytree(runs / "begun", begun)
    os.chdir(begun)
    for path in (begun, *begun.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    before = checksums(TRAPS)
    path = OUTPUT / name
    mode = path.stat().st_mode
    path.chmod(0)
    with nobody():
        end = resume()
    mended = name == "run.json" or name.startswith(NEWEST)  # by the copy in a checkpoint, or by the checkpoint before
    assert end.code in ((0,) if mended else (1, 2)) and "\n" not in end.message, end
    if path.exists():
        path.chmod(mode)
    with nobody():
        assert resume() == End(0)
    assert left_by(OUTPUT) == left_by(runs / "whole" / OUTPUT)
    assert checksums(TRAPS) == before


@pytest.mark.parametrize(
    "hook",
    [
        "rlhf_before_update",
        "rlhf_run_end",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("rlhf_run_start", "rlhf_rollouts_ready", "rlhf_step_end", "rlhf_evaluated")
        ),
    ],
)
def test_a_run_that_is_killed_in_any_phase_leaves_no_lock_and_ends_as_it_would_have(
    hook: str, runs: Path, begun: Path
) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=train_until, args=(options(resume=True), hook, begun)
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    assert resume() == End(0)
    assert left_by(OUTPUT) == left_by(runs / "whole" / OUTPUT)


def test_a_run_that_is_going_on_is_not_resumed_beside_itself(begun: Path) -> None:
    held = Run(make_config(**options(resume=True)))
    with held.folder.open():
        for more in ({}, {"resume": False}):
            with pytest.raises(UsageError, match=rf"run is in use by process {os.getpid()} on "):
                Run(make_config(**{**options(resume=True), **more})).train()
    assert resume() == End(0)
