"""Confine a process, layer by layer, before it runs untrusted code.

| layer | keeps it from |
|---|---|
| namespaces | processes, network and shared memory outside; gives it a folder in memory, of limited size |
| Landlock | files outside that folder, but Python and its libraries |
| seccomp | starting processes, sockets, signals to others, memory that no limit counts |
| limits | more memory, processor time, threads and open files than it may have |

A program is one process: what limits it limits all that it does. Each layer is used where the kernel has it, and
`confine` returns what none of them keeps it from.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rlhf_core.reward.sandbox.landlock import restrict_files
from rlhf_core.reward.sandbox.syscalls import restrict_syscalls

__all__ = ["LAYERS", "OPTIONAL", "Limits", "become_nobody", "confine", "count_as_nobody", "end_with_parent", "isolate"]

LAYERS = ("namespaces", "landlock", "seccomp")
OPTIONAL = "starting many threads"
"""Protections that a confined process does not need."""

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
FOLDER_BYTES = 16 << 20
FOLDER_FILES = 1024
THREADS = 64
DESCRIPTORS = 64
LIBRARIES = (
    "/usr/lib /usr/lib32 /usr/lib64 /usr/local/lib /usr/local/lib64 /lib /lib64 /nix/store /usr/share/zoneinfo "
    "/etc/ld.so.cache /etc/localtime /dev/zero /dev/urandom"
).split()

libc = ctypes.CDLL(None, use_errno=True)


class Limits(NamedTuple):
    """Limits on the resources of a process."""

    seconds: float
    """processor time"""
    memory: int
    """bytes of address space"""


def python_paths() -> set[str]:
    """Return the folders that Python and installed packages are in; a project's own folders may hold the tests, too."""
    packages = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return packages | {sys.prefix, sys.base_prefix, sys.exec_prefix}


def become_nobody() -> None:
    """Drop root for good, if the user nobody can read Python."""
    if os.geteuid() != 0:
        return
    with contextlib.suppress(OSError):
        os.seteuid(NOBODY)
        able = all(os.access(path, os.R_OK, effective_ids=True) for path in (os.__file__, *python_paths()))
        os.seteuid(0)
        if able:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            # Or its files in /proc stay root's, and `isolate` cannot write them.
            libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def count_as_nobody() -> None:
    """Let the kernel count root's processes and threads for the user nobody, since root has no limit. Files remain root's."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setresuid(NOBODY, 0, 0)


def end_with_parent() -> None:
    """Let the kernel end this process with the thread that started it."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def isolate() -> bool:
    """Move this process into its own namespaces; its next child is the first process there. Return False if it can't."""
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWNS) != 0:
        return False
    with contextlib.suppress(OSError):  # without the maps it is the user nobody there
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def confine(limits: Limits, isolated: bool, layers: Collection[str]) -> list[str]:
    """Give up everything that a computation does not need, for good. Return what this process is not kept from.

    Args:
        limits: what it may use.
        isolated: True if it is in its own namespaces (`isolate`).
        layers: those to use; all of `LAYERS` but in tests.
    """
    end_with_parent()
    folder = _mount_folder() if isolated else None
    os.chdir(folder or "/")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no process of the same user reads its memory
    landlock = "landlock" in layers and restrict_files({*LIBRARIES, *python_paths()}, folder)
    _drop_capabilities()
    seccomp = "seccomp" in layers and restrict_syscalls()
    threads = THREADS if isolated else resource.RLIM_INFINITY  # counted for each user, apart in each user namespace
    _set_limits(limits, threads if seccomp else 0, FOLDER_BYTES if folder else 0)
    return [
        *(["files outside its folder"] if not landlock else []),
        *(["the network"] if not (isolated or seccomp) else []),
        *(["signals to other processes"] if not (isolated or seccomp) else []),
        *(["starting processes"] if not seccomp and os.geteuid() == 0 else []),  # it can count as root again
        *([OPTIONAL] if seccomp and (os.getuid() == 0 or not isolated) else []),
    ]


def _mount_folder() -> str | None:
    """Mount an empty folder in memory over one that exists, seen by this process alone. Return its path, None if it can't."""
    libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_FILES},mode=700".encode()
    for path in ("/tmp", "/dev/shm", "/mnt"):  # noqa: S108  # what was there is hidden, and not used
        hides = any(each.startswith(f"{path}/") for each in python_paths())
        if not hides and libc.mount(b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options) == 0:
            return path
    return None


def _drop_capabilities() -> None:
    """Give up what root of the namespace, or of a container, may do."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def _set_limits(limits: Limits, threads: int, file_bytes: int) -> None:
    """Set the limits of the kernel for this process; each is at most what it was."""
    for what, much in (
        (resource.RLIMIT_CPU, int(limits.seconds) + 1),
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_NOFILE, DESCRIPTORS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(what)
        allowed = (
            much if hard == resource.RLIM_INFINITY else hard if much == resource.RLIM_INFINITY else min(much, hard)
        )
        resource.setrlimit(what, (allowed, allowed))
