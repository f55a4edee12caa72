"""Run `rlhf-run` for an ingredient, in a separate process: its memory is free afterwards, and it is stopped like any run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_core.errors import RunStopped

if TYPE_CHECKING:
    from rlhf_core.contract.registry_view import RegistryView

__all__ = ["rlhf_run", "rlhf_run_all"]

GRACE = 150.0
"""Seconds that a process has to save and end after SIGTERM; more than `--stop-within` of a run."""
LINES = 3
"""Lines of its log that a message about a failed process repeats."""


def rlhf_run(words: Sequence[str], registry: RegistryView, log: Path) -> str:
    """Run `rlhf-run WORDS` with the plugins of this process and return what it printed.

    Args:
        words: the command and its flags.
        registry: the plugins that it loads too.
        log: file that its output is added to.

    Raises:
        RunStopped: it failed; the exception has its exit code, and the message the end of its log.
    """
    return rlhf_run_all([(words, log)], registry)[0]


def rlhf_run_all(commands: Sequence[tuple[Sequence[str], Path]], registry: RegistryView) -> list[str]:
    """Run several commands at once, as `rlhf_run` does one, and return what each printed.

    Raises:
        RunStopped: one failed; the others have ended.
    """
    running = [_start(words, registry, log) for words, log in commands]
    try:
        for process, _, _ in running:
            process.wait()
    finally:
        _end(process for process, _, _ in running)
    outputs = []
    for (words, _), (process, log, begun) in zip(commands, running, strict=True):
        text = log.read_bytes()[begun:].decode(errors="replace")
        if process.returncode:
            lines = [line for line in text.splitlines() if line.strip()]
            code = process.returncode if process.returncode > 0 else 128 - process.returncode
            ended = f"rlhf-run {words[0]} ended with code {code}: {' / '.join(lines[-LINES:])}"
            raise RunStopped(f"{ended} (full log: {log})", code)
        outputs.append(text)
    return outputs


def _start(words: Sequence[str], registry: RegistryView, log: Path) -> tuple[subprocess.Popen[bytes], Path, int]:
    """Start one; return it with its log and the size that the log had."""
    command = [sys.executable, "-m", "rlhf_core", *registry.selection.words, *words]
    with log.open("ab") as file:
        begun = file.tell()
        # a separate session: Ctrl-C reaches this process first, which stops the other once
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, preexec_fn=_end_with_parent
        )
    return process, log, begun


def _end_with_parent() -> None:
    """Get SIGTERM when the process that waits for us dies, so that no orphan trains on; Linux only."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Stop what still runs: SIGTERM, so that it saves, then SIGKILL."""
    left = [each for each in processes if each.poll() is None]
    for process in left:
        process.send_signal(signal.SIGTERM)
    for process in left:
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
