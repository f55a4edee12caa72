"""A recipe that is killed at the end of every step and inside every step, and continued, makes what an undisturbed one makes.

Outputs are compared byte for byte: models, curvatures, completions, pairs and metrics of real trainings of a tiny model.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
from killed_recipe import STEPS, cook, outputs_of

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "rlhf_core.run.run",
        "rlhf_core.models.export.folder",
        "transformers.generation",
        "transformers.models.llama.modeling_llama",
        "rlhf_algos",
    ]
)
COUNT = sum(len(each) if isinstance(each, list) else 1 for each in STEPS)


def attempt(output: Path, death: tuple[int, int | None] | None) -> int:
    """Run in a process of its own until its end or its death; return the exit code."""
    process = FORKS.Process(target=cook, args=(str(output), death))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    return process.exitcode or 0


@pytest.mark.slow
def test_a_recipe_killed_at_and_inside_every_step_makes_the_same(tmp_path: Path) -> None:
    straight, killed, dice = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    assert attempt(straight, None) == 0, Path(f"{straight}.log").read_text()
    counts = json.loads(Path(f"{straight}.counts").read_text())
    assert len(counts) == COUNT
    for step, count in enumerate(counts):
        inside = (min(step, 1), dice.randrange(1, count + 1))
        assert attempt(killed, inside) == -signal.SIGKILL, f"step {step} outlived operation {inside[1]} of {count}"
        assert attempt(killed, (0, None)) == -signal.SIGKILL, f"step {step} did not end"
    assert attempt(killed, None) == 0, Path(f"{killed}.log").read_text()
    assert outputs_of(killed) == outputs_of(straight) and len(outputs_of(killed)) == COUNT
    assert not list(killed.glob("steps/.*")), "nothing is left of what was killed"
