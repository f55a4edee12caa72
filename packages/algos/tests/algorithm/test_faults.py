"""Every file of a checkpoint and of a run's folder, damaged in every way: the files of the user stay as they are, the end is
one line with an exit code, and the run that is resumed leaves what an undisturbed one leaves, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_run import (
    CHECKPOINT,
    DAMAGES,
    FILES,
    LATER_TRAPS,
    NEWEST,
    OUTPUT,
    TABLE,
    TRAPS,
    End,
    as_user,
    begin,
    checksums,
    copied,
    left_by,
    refused_until_mended,
    resume,
    truncated,
    write_files,
)


@pytest.fixture(scope="module")
def runs() -> Iterator[Path]:
    with begin() as root:
        yield root


@pytest.fixture
def begun(runs: Path) -> Iterator[Path]:
    with copied(runs) as folder:
        yield folder


def test_the_table_is_long_and_has_every_file_of_a_checkpoint(begun: Path) -> None:
    assert len(TABLE) >= 80
    found = {str(path.relative_to(OUTPUT)) for path in (OUTPUT / NEWEST).rglob("*") if path.is_file()}
    assert found == set(CHECKPOINT)


USERS = ["me", pytest.param("nobody", marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another"))]
QUICK = ("config.toml", f"{NEWEST}/state.json")


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
def test_a_file_that_was_damaged_in_any_way_is_mended_or_named_and_nothing_else_is_touched(
    name: str, user: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = left_by(runs / "whole" / OUTPUT, name)
    for damage, act in DAMAGES.items():
        with copied(runs, "row"):
            before = checksums(TRAPS)
            original = (OUTPUT / name).read_bytes()
            act(OUTPUT / name)
            capsys.readouterr()
            with as_user(user):
                end = resume()
            said = capsys.readouterr().err
            assert end.code == (2 if refused_until_mended(name, damage) else 0), (damage, end)
            assert "\n" not in end.message
            if end.code:
                assert Path(name).name in end.message, (damage, end)
                path = OUTPUT / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                path.write_bytes(original)
                with as_user(user):
                    assert resume() == End(0), damage
            elif name in CHECKPOINT:
                assert f"{OUTPUT / NEWEST} is damaged ({name.removeprefix(f'{NEWEST}/')}" in said, damage
            elif damage in ("zeroed", "flipped") or (name, damage) == ("metrics.jsonl", "removed"):
                assert name in said, (damage, said)
            assert left_by(OUTPUT, name) == whole, damage
            assert checksums(TRAPS) == before, damage


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
    assert end.code == 2 and end.message.startswith("run/model exists and is not a file of this run")
    shutil.move(OUTPUT / "model", OUTPUT / "model-of-mine")
    assert resume() == End(0)
    shutil.move(OUTPUT / "model-of-mine", OUTPUT / "mine")
    assert {name: (OUTPUT / name.replace("model/", "mine/")).read_text() for name in LATER_TRAPS} == LATER_TRAPS
    assert left_by(OUTPUT) == left_by(runs / "whole" / OUTPUT)


def test_a_checkpoint_of_another_run_is_refused_and_never_removed(runs: Path, begun: Path) -> None:
    other = OUTPUT / "checkpoints" / "step-9"
    shutil.copytree(runs / "whole" / OUTPUT / "checkpoints" / "step-3", other)
    end = resume(keep=1)
    assert (end.code, end.message) == (2, f"{other} was not written by the run in run; move it away")
    assert other.is_dir()
