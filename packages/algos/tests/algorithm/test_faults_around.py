"""Failures around a run: missing permissions, kills, and concurrent runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_run import (
    CHECKPOINT,
    NEWEST,
    OUTPUT,
    TRAPS,
    End,
    as_user,
    begin,
    checksums,
    copied,
    give_files,
    left_by,
    options,
    resume,
)
from killed_child import train_until

from rlhf_core import Run, make_config
from rlhf_core.errors import UsageError


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    with begin() as root:
        yield root


@pytest.fixture
def begun(runs: Path) -> Iterator[Path]:
    with copied(runs) as folder:
        yield folder


RIGHTS = {
    "none": (0, True),
    "read-only": (0o555, True),
    "root's, closed": (0o700, False),
    "root's, open": (0o755, False),
}
"""The mode of a file or folder, less the bits to enter it if it is a file, and if the user of the run owns it."""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    "rights", [pytest.param(each, marks=pytest.mark.slow if each != "none" else ()) for each in RIGHTS]
)
@pytest.mark.parametrize(
    "name", [*CHECKPOINT[2:4], "config.toml", "run.json", "metrics.jsonl", "checkpoints", NEWEST, "."]
)
def test_a_file_without_rights_is_one_line_or_set_aside(name: str, rights: str, runs: Path, begun: Path) -> None:
    before = checksums(TRAPS)
    path = OUTPUT / name
    mode, own = RIGHTS[rights]
    given = path.stat().st_mode
    give_files()
    path.chmod(mode if path.is_dir() else mode & 0o666)
    if not own:
        os.chown(path, 0, 0)
    with as_user("nobody", give=False):
        end = resume()
    closed = rights in ("none", "root's, closed")
    expected = {"config.toml": 2 * closed, "metrics.jsonl": 1, "checkpoints": 1, ".": 2}
    assert end.code == expected.get(name, 0) and "\n" not in end.message, end
    assert not end.code or "ermission denied" in end.message, end
    if path.exists():
        path.chmod(given)
    with as_user("nobody"):
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
