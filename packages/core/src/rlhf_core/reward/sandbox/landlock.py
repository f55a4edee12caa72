"""Landlock: the kernel keeps a process from files outside given folders, and from TCP connections."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

__all__ = ["landlock_version", "restrict_files"]

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on every architecture
READ = 1 << 0 | 1 << 2 | 1 << 3  # execute (libraries are mapped so), read a file, list a folder
OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # rights that make sense for a single file
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Rights on files that each version of Landlock knows; later versions know as many as the last."""
TCP = 1 << 0 | 1 << 1  # bind, connect; since version 4
SCOPES = 1 << 0 | 1 << 1  # abstract sockets and signals of processes outside; since version 6

libc = ctypes.CDLL(None, use_errno=True)


class Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr`: what is forbidden unless a rule allows it."""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class Beneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`: what is allowed below a path."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def landlock_version() -> int:
    """Return the version of the kernel's Landlock, at most 0 where there is none."""
    return int(libc.syscall(CREATE_RULESET, None, 0, 1))


def restrict_files(readable: Iterable[str], folder: str | None) -> bool:
    """Forbid files but those below `readable` (reading) and `folder` (anything), and TCP. Return False if that failed.

    The caller has set `no_new_privs`.
    """
    version = landlock_version()
    if version < 1:
        return False
    files = (1 << RIGHTS[min(version, max(RIGHTS))]) - 1
    rules = Ruleset(files, TCP, SCOPES)
    size = 8 if version < 4 else 16 if version < 6 else ctypes.sizeof(Ruleset)
    handle = libc.syscall(CREATE_RULESET, ctypes.byref(rules), size, 0)
    if handle < 0:
        return False
    for path in readable:
        _allow(handle, path, READ)
    _allow(handle, os.devnull, READ | 1 << 1)
    if folder is not None:
        _allow(handle, folder, files)
    forbidden = bool(libc.syscall(RESTRICT_SELF, handle, 0) == 0)
    os.close(handle)
    return forbidden


def _allow(handle: int, path: str, rights: int) -> None:
    """Add a rule for `path`, if it exists."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    rule = Beneath(rights if os.path.isdir(path) else rights & OF_FILES, descriptor)  # noqa: PTH112  # starts quickly
    libc.syscall(ADD_RULE, handle, 1, ctypes.byref(rule), 0)
    os.close(descriptor)
