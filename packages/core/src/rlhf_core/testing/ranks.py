"""Several ranks of CPUs for tests: the processes that `torchrun` would start, without starting Python and torch for each.

    from rlhf_core.cli import main
    from rlhf_core.testing import run_ranks

    def test_two_ranks_train(tmp_path: Path) -> None:
        done = run_ranks(2, main, ["grpo", "--model", "tiny", "--output", str(tmp_path)])
        assert [rank.code for rank in done] == [0, 0], done[0].stderr

A server process imports torch and core once; ranks are its forks. They find modules where the test does. A rank that fails is
not the end of the others at once, as under `torchrun`: each reports its error, or is ended after a while.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.lazy import torch

__all__ = ["RankResult", "run_ranks"]

PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "rlhf_core.cli",
    "rlhf_core.run.run",
    "rlhf_core.training.local_role",
]
PRELOADED += ["rlhf_core.models.export", "rlhf_core.rollout.hf", "rlhf_core.strategy.torch"]
"""Modules that the server of the forks imports."""
GRACE_SECONDS = 60.0
"""Seconds that other ranks have to end, once one failed."""


@dataclass(frozen=True)
class RankResult:
    """Result of a rank."""

    code: int
    """exit status; negative for a signal"""
    stdout: str
    stderr: str


def run_ranks(ranks: int, function: Callable[..., int | None], *args: Any, seconds: float = 300.0) -> list[RankResult]:
    """Call `function(*args)` in several processes, whose environment is that of ranks on one node.

    Args:
        ranks: number of processes; they share a gloo process group once they join it.
        function: importable by name, as its arguments' classes are; what it returns is the exit status, None is 0.
        seconds: limit of the whole.

    Raises:
        AssertionError: a rank did not end in time; with what it wrote to standard error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    untyped: Any = torch.distributed
    store = untyped.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = context.Process(target=_run_rank, args=(own, Path(folder), function, args))
                process.start()
                processes.append(process)
            _await(processes, seconds)
        finally:
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        results = []
        for rank, process in enumerate(processes):
            files = [Path(folder, f"{name}-{rank}") for name in ("out", "err")]
            written = [file.read_text(errors="replace") if file.exists() else "" for file in files]
            results.append(RankResult(process.exitcode, *written))
            process.close()
    failed = any(result.code > 0 for result in results)
    assert not late or failed, f"ranks {late} did not end in {seconds:g} s: {results[late[0]].stderr[-2000:]}"
    return results


def _await(processes: list[Any], seconds: float) -> None:
    """Wait until all have ended, until a while after one failed, or until time is up."""
    end = time.monotonic() + seconds
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < end:
        multiprocessing.connection.wait([process.sentinel for process in alive], max(0.0, end - time.monotonic()))
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + GRACE_SECONDS)


def _run_rank(environment: Mapping[str, str], folder: Path, function: Callable[..., int | None], args: Any) -> None:
    """Be one rank, whose output goes to files."""
    os.environ.clear()
    os.environ.update(environment)
    for name, descriptor in (("out", 1), ("err", 2)):
        with Path(folder, f"{name}-{environment['RANK']}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.exit(function(*args))
