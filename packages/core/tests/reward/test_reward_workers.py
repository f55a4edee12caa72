"""Reward code that raises, hangs, dies, forks or answers wrongly stops the run by name or costs one fallback, and leaves
nothing running."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.engines import open_provider
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.reward.func import Func
from rlhf_core.reward.output import to_reward_output
from rlhf_core.util.worker_processes import Failure, Workers

BAD = {
    "raises": "1 / 0",
    "hangs": "time.sleep(60)",
    "exits": "os._exit(3)",
    "is killed": "os.kill(os.getpid(), 9)",
    "answers for too many": "return [0.0] * 9",
    "answers in words": "return ['good'] * len(completions)",
}
"""What the function does when it meets the completion `bad`."""

REASON = {
    "raises": "ZeroDivisionError: division by zero",
    "hangs": "no answer within 1 s",
    "exits": r"the worker process died \(exit code 3\)",
    "is killed": r"the worker process died \(signal SIGKILL\)",
    "answers for too many": "returned 9 rewards for 1 samples",
    "answers in words": "could not convert string to float",
}


def rollouts(*texts: str) -> Rollouts:
    N = len(texts)
    ones = torch.ones(N, 1, dtype=torch.long)
    return Rollouts(
        prompts=["p"] * N,
        texts=list(texts),
        prompt_NL=ones,
        prompt_lengths_N=ones[:, 0],
        tokens_NT=ones,
        lengths_N=ones[:, 0],
        mask_NT=ones.bool(),
        group_N=torch.arange(N),
        labels=[None] * N,
        meta=[{}] * N,
        finish=["stop"] * N,
    )


def written(folder: Path, bad: str) -> str:
    """A reward file: the length of the completion, and something else for `bad`."""
    path = folder / f"reward_{abs(hash((folder, bad)))}.py"
    path.write_text(
        "import os, subprocess, sys, time\n"
        "def reward_func(completions):\n"
        f"    if 'bad' in completions:\n        {bad}\n"
        "    return {'rewards': [len(c) for c in completions], 'extra_logs': {'pid': [os.getpid() for _ in completions]}}\n"
    )
    return str(path)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A call without a run opens and closes an engine: no worker is left among our children."""
    yield
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    assert not children.exists() or "rlhf_core.util.worker_child" not in str(
        [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()]
    )


MIXED = ("a", "bad", "ccc", "dddd")


@pytest.mark.parametrize("bad", BAD)
def test_a_sample_that_fails_in_a_worker_is_named(tmp_path: Path, bad: str) -> None:
    reward = Func(written(tmp_path, BAD[bad]), workers=2, timeout=1.0 if bad == "hangs" else 120)
    with pytest.raises(UsageError, match=f"{REASON[bad]}.*, on sample 1, prompt 'p', completion 'bad'"):
        reward(rollouts(*MIXED))


@pytest.mark.parametrize("bad", BAD)
def test_a_fallback_takes_the_place_of_the_failed_sample_only_and_is_counted(tmp_path: Path, bad: str) -> None:
    reward = Func(written(tmp_path, BAD[bad]), workers=2, timeout=1.0 if bad == "hangs" else 120, fallback=-1.0)
    output = to_reward_output(reward(rollouts(*MIXED)), rollouts(*MIXED), reward)
    assert output.rewards_N.tolist() == [1, -1, 3, 4]
    assert output.metrics["failed"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("bad", ["raises", "answers for too many", "answers in words"])
def test_the_same_holds_in_this_process(tmp_path: Path, bad: str) -> None:
    path = written(tmp_path, BAD[bad])
    with pytest.raises(UsageError, match=f"{REASON[bad]}.*, on sample 1"):
        Func(path)(rollouts(*MIXED))
    assert Func(path, fallback=0.0)(rollouts(*MIXED)).rewards_N.tolist() == [1, 0, 3, 4]


def test_a_reward_that_is_not_finite_falls_back_or_stops_the_run(tmp_path: Path) -> None:
    path = written(tmp_path, "return [float('nan') if c == 'bad' else 1.0 for c in completions]")
    batch = rollouts(*MIXED)
    assert Func(path, fallback=0.5)(batch).rewards_N.tolist() == [1, 0.5, 1, 1]
    reward = Func(path)
    assert math.isnan(reward(batch).rewards_N[1])
    with pytest.raises(ContractError, match=r"rewards_N = nan for sample 1, prompt 'p', completion 'bad'"):
        to_reward_output(reward(batch), batch, reward)


def test_workers_share_the_samples_and_what_they_print_harms_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, "print('x' * 100000); os.system('echo hello')")
    output = Func(path, workers=2, batch=1)(rollouts(*MIXED * 4))
    assert output.rewards_N.tolist() == [1, 3, 3, 4] * 4
    pids = set(output.metrics["pid"].tolist())
    assert float(os.getpid()) not in pids
    assert len(pids) <= 2


def test_the_clock_starts_when_the_file_is_imported(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "pass"))
    path.write_text("import time; time.sleep(2.0)\n" + path.read_text())
    assert Func(str(path), workers=1, timeout=1.5)(rollouts("a")).rewards_N.tolist() == [1]


def test_what_a_killed_call_had_started_is_killed_too(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    body = f"[time.sleep(0.05) or open({str(marker)!r}, 'a').write('x') for _ in range(600)]"
    start = f"subprocess.Popen([sys.executable, '-c', {f'import time; {body}'!r}]); time.sleep(60)"
    Func(written(tmp_path, start), workers=1, batch=1, timeout=1.0, fallback=0.0)(rollouts("bad"))
    size = marker.stat().st_size if marker.exists() else 0
    time.sleep(0.3)
    assert (marker.stat().st_size if marker.exists() else 0) == size


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("body", ["os.fork()", "os.fork() or 1 / 0"])
def test_a_function_that_forks_answers_once(tmp_path: Path, workers: int, body: str) -> None:
    """Its child neither answers too nor goes on as a second run."""
    path = tmp_path / f"fork_{workers}{len(body)}.py"
    path.write_text(
        "import os\ndef reward_func(completions):\n"
        f"    {body}\n    return {{'rewards': [len(c) for c in completions], 'extra_logs': {{'pid': [os.getpid()] * 4}}}}\n"
    )
    reward = Func(str(path), workers=workers)
    for _ in range(3):
        output = reward(rollouts(*MIXED))
        assert output.rewards_N.tolist() == [1, 3, 3, 4]
        assert (output.metrics["pid"] == os.getpid()).all() == (workers == 0)
    if workers == 0:
        for _ in range(3):
            assert os.WEXITSTATUS(os.wait()[1]) == 0


def test_a_failure_that_no_sample_shows_alone_names_the_batch(tmp_path: Path) -> None:
    path = written(tmp_path, "assert len(completions) == 1")
    with pytest.raises(UsageError, match="AssertionError.*, when called with samples 0 to 3 together, but not"):
        Func(path)(rollouts(*MIXED))


def test_a_timeout_needs_a_process_that_can_be_killed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"timeout needs .* workers = 1"):
        Func(written(tmp_path, "pass"), timeout=1.0)(rollouts("a"))


def test_a_function_that_is_closed_leaves_nothing_and_can_be_opened_again(tmp_path: Path) -> None:
    """Check that processes started by its calls end too."""
    path = written(tmp_path, "subprocess.Popen(['sleep', '600'])")
    for _ in range(2):
        with open_provider(Func(path, workers=1)) as reward:
            pid = int(reward(rollouts("bad")).metrics["pid"][0])
            group = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _group(p) == pid]
            assert len(group) == 2  # the worker and its sleep
        deadline = time.monotonic() + 120
        while any(path.exists() and _group(path) == pid for path in group) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(path.exists() and _group(path) == pid for path in group)


def _group(process: Path) -> int:
    """The process group of /proc/N; 0 if it has gone, or waits to be collected."""
    try:
        state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)


def test_calls_return_in_order_and_exceptions_as_failures() -> None:
    workers = Workers(2, "math:sqrt")
    try:
        results: list[Any] = workers.map([(4.0,), (-1.0,), (9.0,)], timeout=120)
    finally:
        workers.close()
    assert (results[0], results[2]) == (2.0, 3.0)
    assert isinstance(results[1], Failure)
    assert results[1].reason.startswith("ValueError")


STUCK = "__import__('re').match('(a+)+$', 'a' * 60 + 'b')"
"""Backtracks for years in C code, which lets no thread of the interpreter run."""


@pytest.mark.parametrize("work", ["__import__('time').sleep(60)", STUCK])
def test_workers_and_what_they_started_end_when_their_parent_is_killed(work: str) -> None:
    started = "(__import__('os').getpid(), __import__('subprocess').Popen(['sleep', '60']).pid)"
    script = (
        "import os, threading, time\nfrom rlhf_core.util.worker_processes import Workers\n"
        f"w = Workers(1, 'builtins:eval')\nprint(*w.map([({started!r},)], 30)[0], flush=True)\n"
        f"threading.Thread(target=lambda: w.map([({work!r},)], 0), daemon=True).start()\n"
        "time.sleep(0.5)\nos.kill(os.getpid(), 9)"
    )
    said = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False).stdout
    processes = [Path("/proc", pid) for pid in said.decode().split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 120
    while any(map(_group, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_group, processes))
