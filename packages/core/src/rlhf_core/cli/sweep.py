"""`rlhf-run sweep FILE`: every run of a sweep, one after another or several at a time; what is finished is never run again.

Each run is a separate process, `rlhf-run --config OUTPUT/<run>/sweep-config.toml`, whose output goes to
OUTPUT/<run>/log.txt. A run that was killed or failed is resumed from its newest checkpoint. A lock on the run's folder
keeps two sweeps (the tasks of a SLURM array, for example) from taking the same one; a lock dies with its process, so
nothing is to be cleaned.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.analysis.report.writing import report_at_end
from rlhf_core.analysis.sweep import Member, SweepFile, read_sweep, write_configuration
from rlhf_core.checkpoint.own_files import read_own_files
from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError
from rlhf_core.util.atomic_files import write_text
from rlhf_core.util.messages import log
from rlhf_core.util.places import check_writable, read_path

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Sweep", "run_member", "status_table"]


MEMBER_MARK = ".sweep"
"""In a run's folder: the sweep's own files there may be written over."""

SCRIPT_MARK = "# written by rlhf-run sweep"
"""Tells scripts that may be written over."""


@dataclass(frozen=True)
class Sweep(Command):
    """Run a grid of settings for several seeds; a restart resumes failed runs and skips finished ones."""

    file: str
    """TOML file: a base configuration, variants, a grid and seeds; docs/sweeps.md shows one"""
    jobs: int = 1
    """number of runs at the same time on this machine"""
    at_most: int = 0
    """maximum number of runs to start now; 0 starts all"""
    only: int = -1
    """number of the only run to start, from 0, as a task of a SLURM array uses it; -1 starts all"""
    status: bool = False
    """print the table of runs and start none"""
    report: bool = True
    """write report.html in the sweep's output when runs have ended: methods with intervals over seeds"""
    slurm: str = ""
    """file for a SLURM script that runs all runs as an array; no run is started"""
    ray: str = ""
    """file for a script that submits a Ray job for each unfinished run; no run is started"""

    def __call__(self, context: CommandContext) -> int:
        sweep, plugins = read_sweep(self.file), context.registry.selection.words
        if self.only >= len(sweep.members):
            raise UsageError(f"--only {self.only}: choose one of the runs 0 to {len(sweep.members) - 1}")
        if self.slurm:
            _write_script(read_path("--slurm", self.slurm), slurm_script(sweep, plugins))
            print(f"wrote {self.slurm}; submit it with sbatch, which runs {len(sweep.members)} tasks")
            return 0
        if self.ray:
            _write_script(read_path("--ray", self.ray), ray_script(sweep, plugins))
            print(
                f"wrote {self.ray}; run it with bash and RAY_ADDRESS set to the cluster, and it submits one job per run"
            )
            return 0
        if not self.status:
            members = sweep.members if self.only < 0 else sweep.members[self.only : self.only + 1]
            left = [member for member in members if member.state != "finished"]
            self._run(left[: self.at_most or None], sweep, plugins)
        print(status_table(sweep))
        if self.report and not self.status and any(member.is_started for member in sweep.members):
            report_at_end(Path(self.file))
        return int(not self.status and any(member.state == "failed" for member in sweep.members))

    def _run(self, members: list[Member], sweep: SweepFile, plugins: list[str]) -> None:
        """Run them, `jobs` at a time. Ctrl-C or SIGTERM stops what runs, saved, and starts no more."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        running: set[subprocess.Popen[bytes]] = set()
        with ThreadPoolExecutor(max(1, self.jobs)) as pool:
            futures = [pool.submit(run_member, member, sweep, running, plugins) for member in members]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                for process in list(running):
                    process.send_signal(signal.SIGTERM)  # a run saves and ends
                raise


def _write_script(path: Path, text: str) -> None:
    """Write a script in place of an earlier one of this command.

    Raises:
        UsageError: something else is there.
    """
    check_writable("sweep", path)
    own = not path.is_symlink() and path.is_file() and SCRIPT_MARK.encode() in path.read_bytes()
    if os.path.lexists(path) and not own:
        raise UsageError(f"{path} exists and is not a script of this command; name another file")
    write_text(path, text)


def run_member(
    member: Member, sweep: SweepFile, running: set[subprocess.Popen[bytes]], plugins: Sequence[str] = ()
) -> None:
    """Run one member to its end, unless it is finished or another process runs it; its state is then in its folder.

    `plugins` are the words `-p NAME` that the sweep itself was started with.

    Raises:
        UsageError: a file that the sweep would write is there, and the sweep did not write it.
    """
    member.folder.mkdir(parents=True, exist_ok=True)
    _claim(member)
    with _try_lock(member.folder) as lock:
        if lock is None or member.state == "finished":
            return
        words = [
            sys.executable,
            *_ranks(sweep.processes),
            "-m",
            "rlhf_core",
            *plugins,
            "--config",
            str(write_configuration(member)),
        ]
        words += ["--resume"] if member.is_started else []
        member.status_file.unlink(missing_ok=True)
        print(f"{member.name}: {'resumed' if member.is_started else 'begun'}", flush=True)
        started = time.time()
        with (member.folder / "log.txt").open("ab") as log:
            # the run holds the lock too: if this process is killed, no other takes what still runs
            process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, pass_fds=[lock])
            running.add(process)
            code = process.wait()
            running.discard(process)
        status = {"exit": code, "seconds": round(time.time() - started, 1)}
        if code == 0:
            _discard(member, sweep.discard)
        write_text(member.status_file, json.dumps(status))
        if code:
            print(
                f"{member.name}: ended with code {code}, see {member.folder / 'log.txt'}", file=sys.stderr, flush=True
            )


def _claim(member: Member) -> None:
    """Mark the folder of a run as the sweep's.

    Raises:
        UsageError: it is not marked, and holds a file of such a name.
    """
    mark = member.folder / MEMBER_MARK
    if mark.is_file():
        return
    for name in ("sweep-config.toml", "log.txt", member.status_file.name):
        if os.path.lexists(member.folder / name):
            raise UsageError(
                f"{member.folder / name} exists and is not a file of this sweep, which would overwrite it; move it "
                "away, or give the sweep another output"
            )
    mark.touch()


def _discard(member: Member, names: Sequence[str]) -> None:
    """Remove what a finished run wrote; what it did not write stays, and is named."""
    own = read_own_files(member.folder)
    for name in names:
        if own is not None and f"{Path(name).parts[0]}/" in own.names:
            shutil.rmtree(member.folder / name, ignore_errors=True)
        elif (member.folder / name).exists():
            log.warning(f"{member.folder / name} is kept, since it is not a folder of the run")


def _ranks(processes: int) -> list[str]:
    """Return the command line that starts a run as several ranks on this machine."""
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


@contextmanager
def _try_lock(folder: Path) -> Iterator[int | None]:
    """The lock on a folder, None if another process has it."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file.fileno()


def status_table(sweep: SweepFile) -> str:
    """Return one line per run: its number, state, step, and the duration of the last attempt."""
    rows = [("", "run", "state", "step", "seconds")]
    for i, member in enumerate(sweep.members):
        step = max((int(line["step"]) for line in member.metrics()), default=0)
        total = member.settings.get("steps", "")
        shown = f"{step}/{total}" if total else str(step)
        rows.append((str(i), member.name, member.state, shown, str(member.status.get("seconds", ""))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = Counter(member.state for member in sweep.members)
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))])


def slurm_script(sweep: SweepFile, plugins: Sequence[str] = ()) -> str:
    """Return an array script with one task per run. A task that is killed and submitted again continues its run."""
    lines = [
        "#!/bin/bash",
        SCRIPT_MARK,
        f"#SBATCH --job-name={sweep.path.stem}",
        f"#SBATCH --array=0-{len(sweep.members) - 1}",
    ]
    lines += [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in sweep.slurm.items()]
    return "\n".join(
        [*lines, f"cd {shlex.quote(str(Path.cwd()))}", f'{_member_command(sweep, plugins)} "$SLURM_ARRAY_TASK_ID"', ""]
    )


def ray_script(sweep: SweepFile, plugins: Sequence[str] = ()) -> str:
    """A job for each run that is not finished; Ray starts one when what it asks for is free.

    A job works in this folder, which the nodes must share: the runs' state and their locks are there.
    """
    flags = shlex.join([f"--{key}={value}" if value else f"--{key}" for key, value in sweep.ray.items()])
    lines = ["#!/bin/bash", SCRIPT_MARK, "set -e"]
    for number, member in enumerate(sweep.members):
        if member.state != "finished":
            entry = shlex.quote(f"cd {shlex.quote(str(Path.cwd()))} && {_member_command(sweep, plugins)} {number}")
            lines.append(f"ray job submit --no-wait {flags} -- bash -c {entry}  # {member.name}")
    return "\n".join([*lines, ""])


def _member_command(sweep: SweepFile, plugins: Sequence[str]) -> str:
    """The command of one run, less its number."""
    return shlex.join([sys.executable, "-m", "rlhf_core", *plugins, "sweep", str(sweep.path.resolve()), "--only"])
