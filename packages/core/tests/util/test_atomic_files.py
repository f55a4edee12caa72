"""Files survive a crash at any point: old content or new, never a part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.util.atomic_files import discard, fresh_folder, replacing, write_text
from rlhf_core.util.jsonl import append_line, cut_lines


def test_a_failed_write_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("ne")
        raise RuntimeError("disk full")
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_finished_write_replaces_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with fresh_folder(tmp_path / "model") as folder:
            (folder / text).write_text(text)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "two")]


def test_metrics_after_the_checkpoint_and_a_half_written_line_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "rew')
    cut_lines(path, lambda step: step <= 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_lines_with_separators_of_unicode_inside_are_kept_and_half_a_character_at_the_end_is_cut(
    tmp_path: Path,
) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"step": 1, "completion": "a\u2028b\x85c\x0bd"}, {"step": 2, "completion": "é"}]
    for row in rows:
        append_line(path, row)
    with path.open("ab") as file:
        file.write('{"step": 2, "completion": "é'.encode()[:-1])
    cut_lines(path, lambda step: step <= 2)
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == rows


def test_a_discarded_folder_is_never_seen_in_part_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "a").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_core.util.atomic_files.rmtree", lambda *_, **__: None)  # killed before anything was removed
        discard(tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()
    (tmp_path / "step-1").mkdir()
    discard(tmp_path / "step-1")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("old")
    rename = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"), fresh_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Inodes that were forced to the disk, and pairs of inode and new name that were renamed, in order."""
    found: list[Any] = []
    fsync, rename = os.fsync, Path.rename

    def forced(descriptor: int) -> None:
        found.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        found.append((self.stat().st_ino, target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(Path, "rename", renamed)
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after_that(
    tmp_path: Path, events: list[Any]
) -> None:
    write_text(tmp_path / "a", "one")
    file, folder = ((tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino)
    assert events == [file, (file, "a"), folder]


def test_a_folder_is_on_the_disk_with_all_its_files_before_it_has_its_name(tmp_path: Path, events: list[Any]) -> None:
    with fresh_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text("new")
    inside = {each.stat().st_ino for each in (tmp_path / "model").rglob("*")}
    model, parent = (tmp_path / "model").stat().st_ino, tmp_path.stat().st_ino
    at = events.index((model, "model"))
    assert {*inside, model} == set(events[:at]) and events[at + 1 :] == [parent]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_whatever_ends_a_write_leaves_no_temporary_file(error: type[BaseException], tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    with pytest.raises(error), replacing(tmp_path / "a") as file:
        file.write(b"tw")
        raise error
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a", "one")]
