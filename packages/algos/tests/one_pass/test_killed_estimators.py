"""A run of an estimator that is killed (SIGKILL) at any file operation and resumed leaves what an undisturbed one leaves."""

from __future__ import annotations

import multiprocessing
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from head_runs import head_of, options
from killed_child import At, train

from rlhf_core.checkpoint.manifest import valid_checkpoints
from rlhf_core.util.tensor_tree import read_tree

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["rlhf_core.run.run", "rlhf_core.models.export.folder", "transformers.models.llama.modeling_llama", "rlhf_algos"]
)
KILLS = 2


def attempt(made: dict[str, Any], when: At | None = None, count: Path | None = None) -> int:
    """Run in a process of its own, until its end or the file operation; return the exit code."""
    process = FORKS.Process(target=train, args=(made, when, count))
    process.start()
    process.join(200)
    process.kill()
    process.join()
    return process.exitcode or 0


def optimizer_of(output: Path) -> dict[str, Any]:
    """Return the optimizer's state in the newest checkpoint of a run: of an estimator, theta, the curvature and t."""
    (file,) = valid_checkpoints(output)[-1].glob("roles/*/optimizer.safetensors")
    return dict(read_tree(file)["optimizer"]["state"])


def assert_equal(found: Any, expected: Any) -> None:
    """Compare nested states to the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def memory_of(output: Path) -> dict[str, Any]:
    """Return what engines remember in the newest checkpoint, by file: of `ask`, curvature and count of asked pairs."""
    folder = valid_checkpoints(output)[-1] / "providers"
    return {str(path.relative_to(folder)): read_tree(path) for path in sorted(folder.rglob("*.safetensors"))}


ASK = {"algorithm": "active_reward", "advantage": {"use": "ask", "share": 0.5}}


@pytest.mark.parametrize("use", ["omd", "omd_cg", "mle", "omd_memoryless", "ask"])
def test_a_killed_run_resumes_to_the_state_of_a_straight_one(use: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"save_every": 1, "reward": {"features": str(tmp_path / "features")}}
    if use == "ask":
        use, more = "omd", more | ASK
    straight = options(tmp_path / "straight", {"use": use}, **more)
    assert attempt(straight, count=tmp_path / "count") == 0, (tmp_path / "straight.log").read_text()
    operations = int((tmp_path / "count").read_text().split()[0])
    output, dice = tmp_path / "killed", random.Random(use)
    for kill in range(KILLS):
        resume = (output / "config.toml").exists()  # killed before it had written anything, a run just begins
        made = options(output, {"use": use}, **more, resume=resume)
        code = attempt(made, At(dice.randrange(operations // 4, operations)))
        expected = (-signal.SIGKILL, 0) if kill else (-signal.SIGKILL,)  # a resumed run has fewer operations left
        assert code in expected, Path(f"{output}.log").read_text()
    assert attempt(options(output, {"use": use}, **more, resume=True)) == 0, Path(f"{output}.log").read_text()
    assert torch.equal(head_of(output), head_of(tmp_path / "straight"))
    assert_equal(optimizer_of(output), optimizer_of(tmp_path / "straight"))
    assert_equal(memory_of(output), memory_of(tmp_path / "straight"))
    if more.get("advantage"):
        assert [state["labels"] for state in memory_of(output).values()] == [6], "half of three batches of four pairs"
