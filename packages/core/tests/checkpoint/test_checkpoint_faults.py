"""A disk that is full at any file operation of a save leaves the checkpoints before it, and nothing else."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.checkpoint import valid_checkpoints
from rlhf_core.errors import UsageError
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1"


class Disk:
    """Recorder of writes below a folder; one operation fails with a full disk. Audit hooks cannot be removed, so
    there is one, which does nothing unless a folder is watched."""

    def __init__(self) -> None:
        self.folder, self.seen, self.full_at = "", 0, 0
        sys.addaudithook(self._audit)

    @contextmanager
    def watched(self, folder: Path, full_at: int = 0) -> Iterator[None]:
        self.folder, self.seen, self.full_at = str(folder), 0, full_at
        try:
            yield
        finally:
            self.folder = ""

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.folder or event not in ("open", "os.mkdir", "os.rename"):
            return
        if not str(args[0]).startswith(self.folder) or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.seen += 1
        if self.seen == self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def disk() -> Disk:
    return Disk()


def saved(run: Run, step: int) -> None:
    """Save the open run as if it had come to `step`."""
    run.state.step = step
    run.save()
    run.checkpoints.background.wait()


@pytest.mark.parametrize("save_async", [False, True], ids=["waiting", "beside"])
def test_a_full_disk_at_any_operation_leaves_the_checkpoint_before_whole(
    save_async: bool, disk: Disk, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, model=MODEL, save_async=save_async, keep=2)
    checkpoints = tmp_path / "checkpoints"
    with run.open():
        saved(run, 1)
        with disk.watched(checkpoints):
            saved(run, 2)
        operations = disk.seen
        assert operations >= 6, "folders, files that Python opens, and renaming"
        for full_at in range(1, operations + 1):
            with disk.watched(checkpoints, full_at), pytest.raises(OSError, match="No space left on device"):
                saved(run, 2 + full_at)
            assert sorted(path.name for path in checkpoints.iterdir()) == ["step-1", "step-2"], full_at
        assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step-1", "step-2"]
        saved(run, 99)  # and once there is space again, it goes on
        assert [folder.name for folder in valid_checkpoints(tmp_path)] == ["step-2", "step-99"]


def test_another_strategy_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny_run(tmp_path, model=MODEL).train()
    options: dict[str, Any] = {"model": MODEL, "rollout": "fake", "strategy": "fake", "resume": True}
    with pytest.raises(UsageError, match="began with other options: .*rollout=… hf -> fake"):
        tiny_run(tmp_path, **options).train()
    with pytest.raises(UsageError) as caught:
        tiny_run(tmp_path, resume_changed=True, **options).train()
    newest = tmp_path / "checkpoints" / "step-2"
    assert (
        str(caught.value)
        == f"{newest} was written by strategy torch, which fake cannot read; resume with strategy torch"
    )


def test_what_is_restored_is_everything_that_was_saved(tmp_path: Path) -> None:
    """A run that is opened again from its checkpoint would write the same one."""
    run = tiny_run(tmp_path / "run", model=MODEL, steps=2)
    run.train()
    again = tiny_run(tmp_path / "run", model=MODEL, steps=2, resume=True)
    with again.open():
        assert again.step == 2 and again.last_metrics == run.last_metrics
        again.lives.restore()
        saved_before = (tmp_path / "run" / "checkpoints" / "step-2").rename(tmp_path / "before")
        saved(again, 2)
        for path in sorted(p for p in saved_before.rglob("*") if p.is_file()):
            name = path.relative_to(saved_before)
            if name.name in ("run.json", "manifest.json"):
                continue  # the run has exported its model since
            assert (tmp_path / "run" / "checkpoints" / "step-2" / name).read_bytes() == path.read_bytes(), name
