"""The process that runs checks: it imports torch and transformers once, reads names from stdin, and writes events to stdout.

An event is one line of JSON: a row, a goal, a note, a profile, something that does not hold, and at last `ended`. Whatever a
check prints goes to stderr. After an exception the process says so and ends: a device may be beyond use then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_checks.check import Context, find, load

__all__ = ["TRACEBACK_LINES", "work"]

TRACEBACK_LINES = 12
"""Last lines of a traceback that the page shows."""


def work(rehearse: bool) -> None:
    """Run checks until stdin ends."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(event: Any) -> None:
        events.write(json.dumps(event, default=str) + "\n")
        events.flush()

    threading.Thread(target=leave_with_parent, args=(os.getppid(),), daemon=True).start()
    import torch
    import transformers  # noqa: F401  # takes seconds, which pass while another check runs

    if rehearse:
        torch.set_num_threads(1)
    if not (rehearse or torch.cuda.is_available()):
        send({"lacking": f"torch {torch.__version__} sees no GPU here; pass --rehearse to try the checks on the CPU"})
        return
    send({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        device = "cpu" if rehearse else "cuda"
        deadline = time.monotonic() + job["seconds"]
        context = Context(rehearse, device, folder, send, job["limits"], deadline)
        if not run_one(job["name"], context):
            return


def leave_with_parent(parent: int) -> None:
    """End this process, with those that it started, soon after the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def run_one(name: str, context: Context) -> bool:
    """Run one check and send how it ended; returns whether this process can run another."""
    from gpu_checks.measure import release

    try:
        load(find(name))(context)
        release()
        context.send({"ended": "done"})
        return True
    except BaseException as error:
        lines = "".join(traceback.format_exception(error)).splitlines()
        context.send({"ended": "failed", "traceback": lines[-TRACEBACK_LINES:]})
        traceback.print_exc()
        if not isinstance(error, Exception):
            raise
        return False
    finally:
        shutil.rmtree(context.folder, ignore_errors=True)
