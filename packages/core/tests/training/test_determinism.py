"""Determinism: the same configuration and seed give the same numbers and weights, bit for bit on a CPU, in any process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.errors import RunStopped
from rlhf_core.plugins.metric_catalogue import MEASURED
from rlhf_core.testing import tiny_run

CHILD = """
import sys
from rlhf_core.testing import tiny_run
sampling = {"n": 2, "max_new_tokens": 6, "top_p": 0.9}
tiny_run(sys.argv[1], steps=3, update_epochs=2, minibatches=2, save_every=2, sampling=sampling).train()
"""


def left_by(output: Path) -> dict[str, Any]:
    """Return the files of a run, except those with times."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    roles = sorted((output / "checkpoints" / "step-2" / "roles").rglob("*"))
    return {
        "metrics": [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows],
        "samples": (output / "samples.jsonl").read_bytes(),
        "weights": (output / "model" / "model.safetensors").read_bytes(),
        "optimizer": {str(path.relative_to(output)): path.read_bytes() for path in roles if path.is_file()},
    }


def test_two_processes_leave_the_same_bits(tmp_path: Path) -> None:
    """The seed of Python's hashing differs: no order of a set may get into a number."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / name)],
            env=os.environ | {"PYTHONHASHSEED": name, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        for name in ("1", "2")
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert left_by(tmp_path / "1") == left_by(tmp_path / "2")


def test_another_seed_leaves_other_numbers(tmp_path: Path) -> None:
    tiny_run(tmp_path / "a", seed=1).train()
    tiny_run(tmp_path / "b", seed=2).train()
    assert left_by(tmp_path / "a") != left_by(tmp_path / "b")


@pytest.fixture
def restored() -> Any:
    yield
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    os.environ.pop("FLASH_ATTENTION_DETERMINISTIC", None)


@pytest.mark.usefixtures("restored")
def test_the_flag_reaches_torch_and_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    tiny_run(tmp_path / "plain").train()
    tiny_run(tmp_path / "flag", deterministic=True).train()
    assert torch.are_deterministic_algorithms_enabled()
    assert left_by(tmp_path / "plain")["weights"] == left_by(tmp_path / "flag")["weights"]


def test_an_operation_without_a_deterministic_form_stops_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set …")

    monkeypatch.setattr("rlhf_core.training.local_role.LocalRole.train", refuse)
    with pytest.raises(RunStopped) as caught:
        tiny_run(tmp_path).train()
    assert str(caught.value).startswith("cumsum_cuda_kernel has no deterministic implementation (train, step 1)")


@pytest.mark.gpu
@pytest.mark.usefixtures("restored")
def test_two_runs_on_a_device_leave_the_same_bits(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny_run(tmp_path / name, deterministic=True, steps=3).train()
    assert left_by(tmp_path / "a") == left_by(tmp_path / "b")
