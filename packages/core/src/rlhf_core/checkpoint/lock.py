"""The lock on a run's folder: one process writes to it at a time, and others get an error that names it.

    OUTPUT/.run-lock/N.json     host, boot, process and its start time; the file's time is the holder's last sign of life

The file with the greatest N is the lock. Whoever takes it creates N + 1, which succeeds for one process only, on network file
systems too, and removes the files before it. A holder that ends marks its file as released and leaves it, so that numbers never
begin anew and a slow process cannot take a lock twice.

A lock whose holder died is stale. On the same machine the process table decides, so that a requeued job does not stop at its
own ghost, nor at a process that was given the number of the dead one. On another machine an `flock` that is held shows life.
One that is free shows nothing, since some file systems grant it to everybody: then only the sign of life counts. Its age is
measured on the file server's clock, and a young one is watched until it changes or is too old.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlhf_core.errors import RunStopped, UsageError, run_option
from rlhf_core.util.atomic_files import write_bytes
from rlhf_core.util.messages import log

__all__ = ["LOCK_FOLDER", "RunLock"]

LOCK_FOLDER = ".run-lock"
BEAT = 5.0
"""Seconds between two signs of life."""
STALE = 60.0
"""Seconds without one after which a holder on another machine is taken for dead."""
ATTEMPTS = 100
"""Each failed attempt means that another process has taken the lock meanwhile; so many are no accident."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or held it."""

    host: str = ""
    machine: str = ""
    """names a machine since its start, and the process table there: process numbers are compared within one"""
    pid: int = 0
    started: str = ""
    """start time of the process, in ticks since the machine's start; empty where there is no /proc"""
    since: str = ""
    """time at which the lock was taken, for messages"""
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}" if self.pid else "another process"


_GIVEN_BACK: set[Path] = set()
"""Lock files that this process no longer holds, and could not write that into: a notebook's run may be resumed in it."""


class RunLock:
    """The lock of one run on its folder.

    Args:
        output: the folder, which exists when the lock is taken.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / LOCK_FOLDER
        self._number = 0
        """number of the lock file that this object holds; 0 for none"""
        self._descriptor: int | None = None
        self._end = threading.Event()

    def refuse_holder(self) -> None:
        """Check that no live process holds the lock. Nothing is written if it was never taken.

        Raises:
            UsageError: one does; the message names it.
        """
        number = self._newest()
        if number and _is_live(self._path(number)):
            holder = _read(self._path(number))
            raise UsageError(
                f"{self.output} is in use by {holder}; wait until it ends, or name another {run_option('output')}"
            )

    def acquire(self) -> None:
        """Take the lock, and give signs of life until `release`.

        Raises:
            UsageError: a live process holds it; the message names it.
        """
        for _ in range(ATTEMPTS):
            number = self._newest()
            self.refuse_holder()
            if self._create(number + 1):
                threading.Thread(target=self._beat, name="run-lock", daemon=True).start()
                return
        raise UsageError(
            f"{self.output} is locked by other processes again and again; name another {run_option('output')}"
        )

    def check(self) -> None:
        """Check that this run still holds the lock.

        Raises:
            RunStopped: the folder was removed, or another run took the lock while this process was stopped.
        """
        newest = self._newest()
        if newest == self._number:
            return
        if newest == 0:
            raise RunStopped(f"{self.output} was removed while the run wrote to it; the run stops without saving")
        raise RunStopped(
            f"{self.output} was taken over by {_read(self._path(newest))}, since this process sent no heartbeat"
        )

    def release(self) -> None:
        """Let others take the lock."""
        if not self._number:
            return
        self._end.set()
        try:
            if self._newest() == self._number:
                holder = replace(_read(self._path(self._number)), released=True)
                write_bytes(self._path(self._number), json.dumps(asdict(holder)).encode())
        except OSError:  # a folder that is gone or read-only now, a full disk: others see that the process ended
            _GIVEN_BACK.add(self._path(self._number).absolute())
        finally:
            self._number = 0
            if self._descriptor is not None:
                os.close(self._descriptor)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _newest(self) -> int:
        """Return the number of the newest lock file; 0 if there is none."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return max(
            (int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()), default=0
        )

    def _create(self, number: int) -> bool:
        """Return True if this process made the lock file `number` and it is the newest: the lock is taken then."""
        self.folder.mkdir(exist_ok=True)
        draft = self.folder / f".{secrets.token_hex(8)}.draft"
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(descriptor, json.dumps(asdict(_this_process())).encode())
            os.fsync(descriptor)
            _try_flock(descriptor)
            if not _give_name(draft, self._path(number)):
                os.close(descriptor)
                return False
        finally:
            draft.unlink(missing_ok=True)
        if self._newest() != number:  # it was taken and given back meanwhile, more than once
            self._path(number).unlink(missing_ok=True)
            os.close(descriptor)
            return False
        for older in self.folder.iterdir():  # also what killed processes were about to name
            if older.suffix in (".draft", ".tmp") or (older.stem.isdigit() and int(older.stem) < number):
                older.unlink(missing_ok=True)
        self._number, self._descriptor = number, descriptor
        return True

    def _beat(self) -> None:
        path = self._path(self._number)
        while not self._end.wait(BEAT):
            try:
                os.utime(path)
            except FileNotFoundError:
                return  # `check` reports it to the run
            except OSError:  # a file server that does not answer for a moment
                continue


def _give_name(draft: Path, path: Path) -> bool:
    """Return True if `path` is now a name of the file `draft`, False if there was one of that name."""
    try:
        os.link(draft, path)
    except (FileExistsError, FileNotFoundError):  # another process was faster and has removed the drafts
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        try:  # a file system without links
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        os.write(descriptor, draft.read_bytes())
        os.close(descriptor)
    return True


def _read(path: Path) -> Holder:
    """The holder that a lock file names; an unknown one if it is not written yet, or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**{name: found[name] for name in Holder.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Holder()


def _is_live(path: Path) -> bool:
    """Return True if the holder of the lock file `path` is alive, or may be. Waits at most `STALE` seconds."""
    holder, here = _read(path), _this_process()
    if holder.released or path.absolute() in _GIVEN_BACK:
        return False
    if holder.machine and holder.machine == here.machine:
        return _start_time(holder.pid) == holder.started if holder.started else _exists(holder.pid)
    if _is_locked(path):
        return True
    try:
        seen = path.stat().st_mtime_ns
        if _age(path) > STALE:
            return False
        log.warning(f"{path.parent.parent} is in use by {holder}; waiting up to {STALE:.0f} s for its heartbeat")
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(BEAT / 5, STALE / 20))
            if path.stat().st_mtime_ns != seen:
                return not _read(path).released
    except FileNotFoundError:
        pass  # another process has taken the lock: the caller looks again
    return False


def _age(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system that holds `path`."""
    probe = path.with_name(f".{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    """Return True if another process holds an `flock` on the file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_flock(descriptor)
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int) -> bool:
    """Take an `flock` where there are any; return False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # this file system has none
    return True


def _this_process() -> Holder:
    pid = os.getpid()
    return Holder(socket.gethostname(), _machine(), pid, _start_time(pid), time.strftime("%Y-%m-%d %H:%M:%S"))


def _machine() -> str:
    """The machine since its start, and the process table there, which each container has for itself."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()  # no Linux


def _start_time(pid: int) -> str:
    """The start time of a live process in ticks; empty if there is none, or no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a zombie is dead


def _exists(pid: int) -> bool:
    """Return True if there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
