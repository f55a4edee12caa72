"""Writing so that a crash loses nothing: to a temporary name, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

__all__ = ["fresh_folder", "fsync_tree", "temporary_name", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _fsync(path.parent)


def temporary_name(path: Path) -> Path:
    """Where `fresh_folder(path)` is written."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` (replacing it) when the block ends without an error."""
    temporary = temporary_name(path)
    rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    fsync_tree(temporary)
    if path.exists():  # rename cannot replace a folder that holds files
        old = path.with_name(f".{path.name}.old")
        rmtree(old, ignore_errors=True)
        path.rename(old)
        temporary.rename(path)
        rmtree(old)
    else:
        temporary.rename(path)
    _fsync(path.parent)


def fsync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
