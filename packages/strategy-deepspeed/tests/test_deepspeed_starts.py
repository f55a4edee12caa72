"""Every way to start ranks gives the same run: `torchrun`, the launcher `deepspeed`, one process, and workers of Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rlhf_algos", reason="runs an algorithm of rlhf-algos")

pytestmark = [pytest.mark.engines, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]

RUN = "grpo --model tiny --reward length --sampling.n 2 --sampling.max-new-tokens 8 --actor.optim.lr 1e-3".split()
RUN += "--steps 3 --batch-size 4 --strategy deepspeed --strategy.stage 2".split()
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
SCRIPTS = Path(sys.executable).parent
RAY = "--launcher ray --launcher.workers 2 --launcher.cpus 0.1".split()


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, except seconds and those that depend on the distribution of rows over ranks."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    apart = ("time/", "speed/", "memory/", "padding", "sync/", "recovered/")
    return [{name: value for name, value in row.items() if not name.startswith(apart)} for row in rows]


def start(command: list[str], output: Path) -> list[dict[str, Any]]:
    path = os.pathsep.join([str(SCRIPTS), os.environ["PATH"]])
    env = {**os.environ, **QUIET, "PATH": path}
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "model" / "model.safetensors").exists()
    return metrics(output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The run in one process without a launcher."""
    return start([sys.executable, "-m", "rlhf_core", *RUN], tmp_path_factory.mktemp("alone") / "run")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_core"]
DEEPSPEED = [str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", shutil.which("rlhf-run", path=str(SCRIPTS)) or ""]
WITHIN_RAY = [sys.executable, "-m", "rlhf_core"]


@pytest.mark.parametrize(
    ("command", "more"),
    [
        pytest.param(TORCHRUN, [], id="torchrun"),
        pytest.param(DEEPSPEED, [], id="deepspeed"),
        pytest.param(
            WITHIN_RAY,
            RAY,
            id="ray",
            marks=pytest.mark.skipif(
                find_spec("rlhf_distributed_ray") is None or find_spec("ray") is None, reason="needs ray"
            ),
        ),
    ],
)
def test_two_ranks_give_the_numbers_of_one_process_however_they_are_started(
    command: list[str], more: list[str], alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = start([*command, *RUN, *more], tmp_path / "run")
    assert len(found) == len(alone) == 3
    for ours, theirs in zip(found, alone, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-4) for name, value in theirs.items()}
