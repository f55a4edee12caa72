"""Ranks of the authors' kit: processes with the environment of torchrun, and no rank is waited for in vain."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from rlhf_core.launcher.local import join_world
from rlhf_core.testing import run_ranks


def total(text: str) -> int:
    """The sum of all ranks' numbers, in the order of ranks."""
    world = join_world()
    print(text, int(world.total(world.rank + 1)), os.environ["LOCAL_RANK"])
    print("to standard error", file=sys.stderr)
    return world.rank


def stuck(path: str) -> int:
    """Rank 1 ends as `path` says; rank 0 waits for a collective call that never comes, or forever."""
    if os.environ["RANK"] == "0":
        time.sleep(600)
    if path == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if path == "raises":
        raise ValueError("what rank 1 says")
    time.sleep(600)
    return 0


def test_ranks_share_a_process_group_and_each_has_its_status_and_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("first", "second"):
        done = run_ranks(2, total, text)
        assert [rank.code for rank in done] == [0, 1]
        assert [rank.stdout for rank in done] == [f"{text} 3 0\n", f"{text} 3 1\n"]
        assert all("to standard error" in rank.stderr for rank in done)


def test_ranks_that_wait_for_one_that_failed_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.testing.ranks.GRACE_SECONDS", 0.2)
    raised = run_ranks(2, stuck, "raises")
    assert [rank.code for rank in raised] == [-signal.SIGKILL, 1] and "what rank 1 says" in raised[1].stderr
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not end"):
        run_ranks(2, stuck, "killed")
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not end in 1 s"):
        run_ranks(2, stuck, "sleeps", seconds=1)
