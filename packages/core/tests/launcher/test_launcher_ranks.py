"""Ranks that cannot be: said in one line before a process group is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from limited_ranks import write_limits

from rlhf_core.errors import UsageError
from rlhf_core.launcher.local import join_world
from rlhf_core.testing import run_ranks


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("there is no such device"))
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        join_world()
    assert str(caught.value) == (
        "process 3 of this node has no GPU, since the node has 2; start at most 2 processes per node, or set "
        "CUDA_VISIBLE_DEVICES= to run on CPUs"
    )


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (join_world().rank, join_world().size) == (0, 1)
    assert not torch.distributed.is_initialized()


def test_ranks_that_share_rows_wait_as_long_as_the_launcher_says(tmp_path: Path) -> None:
    """Torch's own limit for a group is half an hour."""
    done = run_ranks(2, write_limits, tmp_path, seconds=60.0)
    assert not any(rank.code for rank in done), done[0].stderr[-2000:]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["45 45"] * 2
