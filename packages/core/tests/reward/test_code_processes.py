"""Processes of `--reward code`: none outlives its sample or its run, and what a machine lacks is said once."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_core.errors import UsageError
from rlhf_core.reward.code import Code
from rlhf_core.reward.code_labels import Assertions, Scripts
from rlhf_core.reward.sandbox.confinement import OPTIONAL
from rlhf_core.reward.sandbox.server import SandboxServer

PASS = Assertions(["pass"])


def processes() -> dict[int, tuple[str, int, int]]:
    """Return `{number: (state, parent, session)}` of all processes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session, *_ = path.read_text().rpartition(")")[2].split()
            found[int(path.parent.name)] = (state, int(parent), int(session))
    return found


def in_session(session: int) -> list[int]:
    return [number for number, (state, _, each) in processes().items() if each == session and state != "Z"]


def wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("work", ["import time; time.sleep(60)", "import re; re.match('(a+)+$', 'a' * 60 + 'b')"])
def test_programs_end_when_the_run_is_killed(work: str) -> None:
    """One that sleeps, and one that computes in C."""
    script = (
        "from rlhf_core.reward.code import Code, SandboxServer\nfrom rlhf_core.reward.code_labels import Assertions\n"
        f"with SandboxServer() as server: Code(timeout=50.0).judge(server, {work!r}, Assertions(['pass']))"
    )
    run = subprocess.Popen([sys.executable, "-c", script])
    with contextlib.ExitStack() as stack:
        stack.callback(run.wait)
        stack.callback(run.kill)
        wait_for(lambda: any(parent == run.pid for _, parent, _ in processes().values()))
        server = next(number for number, (_, parent, _) in processes().items() if parent == run.pid)
        wait_for(lambda: len(in_session(server)) >= 4)  # server, keeper, program, tests
    wait_for(lambda: not in_session(server))


def test_a_sample_leaves_no_process() -> None:
    hidden = "import threading, time\nfor _ in range(5): threading.Thread(target=time.sleep, args=(60,)).start()"
    with SandboxServer() as server:
        for tests in (PASS, Assertions(["assert False"]), Scripts([""], [""])):
            Code(timeout=2.0).judge(server, hidden, tests)
            wait_for(lambda: server._process.pid not in [parent for _, parent, _ in processes().values()])
            wait_for(lambda: in_session(server._process.pid) == [server._process.pid])
    assert in_session(server._process.pid) == []


def test_a_sandbox_that_fails_stops_the_run() -> None:
    with SandboxServer() as server:
        assert Code().judge(server, "", PASS) == [True]
        os.kill(server._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="reward code: the sandbox gave no answer"):
            Code().judge(server, "", PASS)


def test_what_a_machine_lacks_is_said_once_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with SandboxServer() as server, caplog.at_level(logging.WARNING, "rlhf"):
        for _ in range(2):
            assert Code(confine=False).judge(server, "", PASS, ("seccomp",)) == [True]
        assert [record.message for record in caplog.records if "files" in record.message] == [
            f"reward code: this machine does not confine programs (not blocked: files outside its folder, {OPTIONAL})"
        ]
        with pytest.raises(UsageError) as caught:
            Code().judge(server, "", PASS, ("namespaces", "seccomp"))
    assert str(caught.value).startswith(
        "reward code: this machine cannot confine programs (not blocked: files outside its folder"
    )
    assert str(caught.value).endswith(
        "a kernel with Landlock (5.13) and libseccomp or user namespaces, or run it in a container with confine = false"
    )


def test_a_machine_is_checked_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Code().check()
    monkeypatch.setattr(SandboxServer, "ask", lambda *_: {"open": ["the network"], "results": [True]})
    with pytest.raises(UsageError, match="this machine cannot confine programs .not blocked: the network"):
        Code().check()
    Code(confine=False).check()
