"""Runs checks in worker processes, one at a time, within the minutes given; the page is written again after every event.

A worker runs check after check as long as they end well. One that fails, or is cut at its limit, is left, and the next check
gets another process, which has imported torch while the one before ran.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu_checks.check import Check
from gpu_checks.page import Report

__all__ = ["Driver"]

LEAST = 8.0
"""Seconds that must be left for a check to begin."""

START = 120.0
"""Seconds that a worker may take until it is ready."""


class Worker:
    """A process that runs checks."""

    def __init__(self, script: Path, rehearse: bool, log: IO[bytes]) -> None:
        command = [sys.executable, str(script), "--worker", *(["--rehearse"] if rehearse else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.put(json.loads(line))
        self.events.put(None)

    def ask(self, name: str, seconds: float, limits: dict[str, float]) -> None:
        """Let it run a check."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"name": name, "seconds": seconds, "limits": limits}) + "\n")
        self.process.stdin.flush()

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """Return the next event; None where the process has ended.

        Raises:
            queue.Empty: there is none within the time.
        """
        return self.events.get(timeout=max(0.01, seconds))

    def kill(self) -> None:
        """End the process and those that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Driver:
    """One run of the script.

    Args:
        script: what workers run.
        report: takes what checks find.
        minutes: for all checks together.
        log: where workers' stderr goes.
    """

    script: Path
    report: Report
    rehearse: bool
    minutes: float
    log: IO[bytes]
    limits: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + 60 * self.minutes
        self._current: Worker | None = None
        self._spare: Worker | None = None

    def run(self, checks: Sequence[Check]) -> None:
        """Run checks in order; what does not fit into the time is reported as not run."""
        try:
            for check in checks:
                left = self.deadline - time.monotonic()
                if left < LEAST:
                    self.report.end(check.name, "not run: no time", 0.0)
                    continue
                self._run_one(check, min(left, check.seconds if not self.rehearse else left))
        finally:
            for worker in (self._current, self._spare):
                if worker is not None:
                    worker.kill()

    def _run_one(self, check: Check, seconds: float) -> None:
        fresh = check.fresh and not self.rehearse
        if fresh:
            self._leave()
        worker = self._worker()
        if self._spare is None and not self.rehearse:
            self._spare = Worker(self.script, self.rehearse, self.log)  # imports while this one works
        self.report.begin(check.name)
        started = time.monotonic()
        try:
            worker.ask(check.name, seconds, self.limits)
            status = self._follow(check, worker, started + seconds)
        except BrokenPipeError:
            status = f"failed: the process ended with code {worker.process.wait()}"
        self.report.end(check.name, status, time.monotonic() - started)
        if fresh or status != "done":
            self._leave()

    def _follow(self, check: Check, worker: Worker, until: float) -> str:
        """Hand events to the report until the check has ended; returns how."""
        while True:
            try:
                event = worker.next_event(until - time.monotonic())
            except queue.Empty:
                return f"cut after {self.report.seconds_of(check.name):.0f} s"
            if event is None:
                return f"failed: the process ended with code {worker.process.wait()}"
            if "ended" in event:
                self.report.add(check.name, event)
                return str(event["ended"])
            self.limits |= event.get("limits", {})
            self.report.add(check.name, event)

    def _worker(self) -> Worker:
        """Return a worker that is ready."""
        if self._current is None:
            self._current = self._spare or Worker(self.script, self.rehearse, self.log)
            self._spare = None
            event = self._current.next_event(START)
            if event is None:
                code = self._current.process.wait()
                raise SystemExit(
                    f"gpu.py: a worker ended with code {code} before it was ready; {self.log.name} says why"
                )
            if "lacking" in event:
                raise SystemExit(f"gpu.py: {event['lacking']}")
        return self._current

    def _leave(self) -> None:
        """Take another worker for the next check."""
        if self._current is not None:
            self._current.kill()
        self._current = None
