"""Check output paths before a command computes anything, so that an impossible name ends in a one-line error."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_core.errors import UsageError

__all__ = ["check_writable", "new_folder", "read_path"]


def read_path(option: str, text: str) -> Path:
    """Return a path that a user names, with `~` for the home folder.

    Raises:
        UsageError: it can name nothing.
    """
    if "\0" in text:
        raise UsageError(f"{option} {text!r} contains a NUL character; remove it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{option} {text}: there is no such user; give the full path") from None


def new_folder(option: str, text: str) -> Path:
    """Return the folder that a command is about to make.

    Raises:
        UsageError: it is there already, or cannot be made.
    """
    path = read_path(option, text)
    if os.path.lexists(path):
        raise UsageError(f"{option} {path}: it already exists; name a new folder")
    check_writable(option, path)
    return path


def check_writable(option: str, path: Path) -> None:
    """Check that something can be made at `path`: the nearest folder above it that is there takes it.

    Raises:
        UsageError: it is no folder, or may not be written.
    """
    above = next(each for each in path.absolute().parents if os.path.lexists(each))
    try:
        os.scandir(above).close()
    except OSError as error:
        raise UsageError(f"{option} {path}: {above}: {error.strerror}; name another place") from None
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UsageError(f"{option} {path}: {above} is not writable; name another place")
