"""Writing so that a crash loses nothing: to a temporary name, fsync, rename."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import BinaryIO

from rlhf_core.errors import UsageError, run_option

__all__ = [
    "check_links",
    "discard",
    "force",
    "fresh_folder",
    "fsync_tree",
    "inside",
    "remove_leftovers",
    "replacing",
    "temporary_name",
    "write_bytes",
    "write_text",
]


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; readers see the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; readers see the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends without an error; until then `path` is what it was."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # random: no other file has this name
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    force(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `write_bytes(path)` that a killed process left."""
    drawn = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for each in path.parent.glob(".*.tmp"):
        if drawn.fullmatch(each.name) and each.is_file():
            each.unlink()


def discard(folder: Path) -> None:
    """Remove a folder atomically, so that its name never refers to a part of it."""
    doomed = temporary_name(folder)
    rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    rmtree(doomed)


def temporary_name(path: Path) -> Path:
    """Return the temporary path that `fresh_folder(path)` writes."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def fresh_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    Args:
        path: the folder.
        replace: take the place of what has its name, which must be the caller's own.

    Raises:
        UsageError: there is something of that name, and `replace` is False.
    """
    temporary = temporary_name(path) if replace else path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    if replace:
        rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fsync_tree(temporary)
        if not replace and os.path.lexists(path):
            raise UsageError(f"{path} already exists; name a new folder")
        _replace(path, temporary)
    except BaseException:  # half a folder is useless, above all on a full disk
        rmtree(temporary, ignore_errors=True)
        raise
    force(path.parent)


def _replace(path: Path, new: Path) -> None:
    """Give the folder `new` the name `path`, in place of what has it."""
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".{path.name}.old")  # rename cannot replace a folder that holds files
    rmtree(old, ignore_errors=True)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    rmtree(old)


def fsync_tree(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        force(path)
    force(folder)


def force(path: Path) -> None:
    """Force what was written to a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, if it is inside `folder`, links followed.

    Raises:
        UsageError: it leads out, by `..`, by a link, or as an absolute path.
    """
    path, root = (folder / name).resolve(), folder.resolve()
    if path == root or not path.is_relative_to(root):
        raise UsageError(f"{name!r} points outside {folder}; name something inside it")
    return folder / name


def check_links(folder: Path) -> None:
    """Check that no link leads out of the output `folder` where a run writes: writing below it must not write elsewhere.

    That is in it, and anywhere below its checkpoints and models. Links of a tracker in its own folder are allowed.

    Raises:
        UsageError: one does.
    """
    root, written = Path(os.path.realpath(folder)), list(folder.glob("*"))
    for own in list(written):
        if own.name.startswith(("checkpoints", "model")) and not own.is_symlink():
            written += [Path(at, name) for at, folders, files in os.walk(own) for name in (*folders, *files)]
    for path in written:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):  # which takes links in a circle
            raise UsageError(
                f"{path} is a link that points outside {folder}; remove it, or name another {run_option('output')}"
            )
