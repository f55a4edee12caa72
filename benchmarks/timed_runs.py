"""Training runs on one machine, several at a time, that end within a number of minutes and are continued another day.

What is known of each run is a record; all records are written to OUTPUT/state.jsonl after every run. A study that is started
again, or with the state of another machine, leaves finished runs alone. What does not fit into the time is not begun.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from source_tree import ROOT

__all__ = ["SHARED_ROLLOUT", "Planned", "TimedRuns", "name_device", "quiet_environment"]

GIGABYTE = 2**30

SHARED_ROLLOUT = {"use": "hf", "graphs": "off"}
"""Sampling for runs that share a GPU: a sampler with graphs takes half of the memory that is free."""

Record = dict[str, Any]


def quiet_environment() -> None:
    """Set what the runs inherit: one thread each, no hub, and memory that many processes can share."""
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class Planned:
    """A run to make."""

    name: str
    method: str
    seed: int
    settings: dict[str, Any] = field(repr=False)
    """its whole configuration, but for the folder of its output"""

    @property
    def key(self) -> str:
        """Tell runs of other settings apart; where the model and the repository lie changes nothing."""
        kept = {name: value for name, value in self.settings.items() if name != "model"}
        text = json.dumps(kept, sort_keys=True).replace(str(ROOT), "")
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TimedRuns:
    """Runs, what is known of them, and the time that is left.

    Args:
        output: folder of state.jsonl and of what `write` makes.
        planned: all runs, in the order in which they are made.
        jobs: runs at a time.
        minutes: everything ends within this time; runs that are cut are recorded as far as they came.
        read: what is recorded of a run's folder, given as a `Member` of a sweep.
        write: called after every run with all records, by name, and facts about the study.
        work: folder of the runs, kept and continued; a folder that is removed at the end if absent.
        earlier: state.jsonl of another machine.
    """

    def __init__(
        self,
        output: Path,
        planned: list[Planned],
        jobs: int,
        minutes: float,
        read: Callable[[Any], Record],
        write: Callable[[list[Record], Record], None],
        work: Path | None = None,
        earlier: Path | None = None,
    ) -> None:
        self.output, self.planned, self.jobs, self.read, self.write = output, planned, jobs, read, write
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes
        self.records: dict[str, Record] = {}
        self.lock = threading.Lock()
        self.running: dict[str, set[Any]] = {}
        self.cut = False
        self.broken = False
        """the first runs all failed: the others would, too"""
        self.device = name_device()
        output.mkdir(parents=True, exist_ok=True)
        self.restore(earlier)
        self.temporary = work is None
        self.work = work or work_folder()

    def restore(self, earlier: Path | None) -> None:
        """Read which runs are finished.

        Raises:
            SystemExit: they had other settings.
        """
        own = self.output / "state.jsonl"
        keys = {planned.name: planned.key for planned in self.planned}
        for path in (path for path in (earlier, own) if path and (path == earlier or path.is_file())):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                name = record["run"]
                if keys.get(name, record["key"]) != record["key"]:
                    raise SystemExit(f"{path}: {name} had other settings; give those again, or another --output")
                if record["finished"]:
                    self.records[name] = record

    def run(self) -> bool:
        """Make what is missing, and return True unless a run failed."""
        waiting = [planned for planned in self.planned if planned.name not in self.records]
        with self.lock:
            self.save()
        workers = [threading.Thread(target=self.make_runs, args=(waiting,)) for _ in range(self.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(max(0.0, self.deadline - time.monotonic()))
        with self.lock:
            self.cut = True
        while any(worker.is_alive() for worker in workers):  # one may have been about to start its process
            self.kill()
            time.sleep(0.1)
        with self.lock:
            self.save()
        if self.temporary:
            shutil.rmtree(self.work, ignore_errors=True)
        return all(record["finished"] or record["cut"] for record in self.records.values())

    def kill(self) -> None:
        """End what runs without its saving anything, which would take longer than is left."""
        for process in [process for running in list(self.running.values()) for process in list(running)]:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own

    def make_runs(self, waiting: list[Planned]) -> None:
        """Take runs off the list until none fits into the time that is left."""
        while True:
            with self.lock:
                planned = next((each for each in waiting if self.fits(each)), None)
                if planned is None or self.cut or self.broken:
                    return
                waiting.remove(planned)
                self.running[planned.name] = set()
            self.make(planned)

    def fits(self, planned: Planned) -> bool:
        """Return True if a run can be expected to finish; where none has yet, it is tried."""
        finished = [record for record in self.records.values() if record["finished"]]
        known = [record["seconds"] for record in finished if record["method"] == planned.method]
        known = known or [record["seconds"] for record in finished]
        return time.monotonic() + (sum(known) / len(known) if known else 0) < self.deadline

    def make(self, planned: Planned) -> None:
        """Make one run, a process of its own, and record how far it came."""
        from rlhf_core.analysis.sweep import Member, SweepFile
        from rlhf_core.cli.sweep import run_member

        folder = self.work / planned.name
        settings = {**planned.settings, "output": str(folder)}
        member = Member(planned.name, planned.method, planned.seed, settings, folder)
        began = time.monotonic()
        run_member(
            member, SweepFile(self.work, self.work, (member,), ("checkpoints", "model")), self.running[planned.name]
        )
        finished = member.state == "finished"
        record = {
            "run": planned.name, "method": planned.method, "seed": planned.seed, "key": planned.key,
            "finished": finished, "seconds": round(time.monotonic() - began, 1), "device": self.device,
            **self.read(member),
        }  # fmt: skip
        with self.lock:
            failed = not finished and not self.cut
            error = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-1500:] if failed else ""
            self.records[planned.name] = {**record, "cut": not finished and self.cut, "error": error}
            known = self.records.values()
            self.broken = len(known) >= self.jobs and not any(each["finished"] for each in known)
            if self.broken:
                print("the first runs all failed; no more are started", file=sys.stderr)
            self.save()
        if self.temporary:
            shutil.rmtree(folder, ignore_errors=True)

    def save(self) -> None:
        """Write the state and what `write` makes; the lock is held."""
        from rlhf_core.util.atomic_files import write_text

        records = [self.records[name] for name in sorted(self.records)]
        write_text(self.output / "state.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        facts = {
            "device": self.device, "seconds": round(time.monotonic() - self.began, 1), "jobs": self.jobs,
            "finished": sum(record["finished"] for record in records), "planned": len(self.planned),
        }  # fmt: skip
        self.write(records, facts)


def name_device() -> str:
    """Return what the GPU is called, or `CPU`, without importing torch."""
    found = shutil.which("nvidia-smi")
    if found is None:
        return "CPU"
    words = [found, "--query-gpu=name", "--format=csv,noheader"]
    asked = subprocess.run(words, capture_output=True, text=True, timeout=30)
    return asked.stdout.strip().partition("\n")[0] or "CPU"


def work_folder() -> Path:
    """Return a fresh folder: in memory where there is much, since each run writes gigabytes that are discarded."""
    memory = Path("/dev/shm")  # noqa: S108 -- the folder's own name is drawn
    large = memory.is_dir() and shutil.disk_usage(memory).free > 32 * GIGABYTE
    return Path(tempfile.mkdtemp(prefix="timed-runs-", dir=memory if large else None))
