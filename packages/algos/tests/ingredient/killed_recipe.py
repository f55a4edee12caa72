"""One attempt at a recipe, for `test_killed_recipes`: a forked server can only call what it can import."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from in_process import run_in_this_process

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
DPO = {"algorithm": "dpo", "steps": 2, "batch_size": 2, "save_every": 1, "actor": {"optim": {"lr": 1e-3}}}
RM = {
    "algorithm": "reward",
    "batch_size": 1,
    "save_every": 1,
    "reward": {"freeze": ["body"], "optim": {"use": "omd", "damping": 0.5}},
}
INGREDIENTS: dict[str, Any] = {
    "rows": {"most": 3},
    "generate": {
        "n": 3,
        "reads": {"model": "policy"},
        "settings": {"sampling": {"max_new_tokens": 6}, "batch_size": 1},
    },
    "label": {"use": "score", "settings": {"reward": {"use": "length", "unit": "words"}, "batch_size": 3}},
    "pairs": {"ties": "keep"},
    "first_rm": {
        "use": "train",
        "reads": {"model": "policy", "data": "pairs"},
        "writes": {"model": "reward"},
        "settings": RM,
    },
    "dpo": {
        "use": "train",
        "reads": {"model": "policy", "data": "pairs", "reference": "policy@initial"},
        "writes": {"model": "policy", "state": "dpo state", "run": "dpo run"},
        "settings": DPO,
    },
    "predict": {
        "use": "score",
        "reads": {"reward": "reward", "state": "state"},
        "writes": {"scores": "predictions"},
        "settings": {"reward": "uncertain"},
    },
    "rm": {
        "use": "train",
        "reads": {"model": "reward", "data": "pairs", "state": "state"},
        "writes": {"model": "reward"},
        "settings": RM,
    },
    "collect": {"reads": {"table": "scores@all"}},
}
STEPS = ["rows", "generate", "label", "pairs", "first_rm", ["dpo", "generate", "predict", "label", "rm"], "collect"]


class Death:
    """SIGKILL at a file operation in the recipe's folder, counted from the end of the step before.

    Args:
        output: folder of the recipe.
        passed: ends of steps to let pass: 1 if the attempt before died at one, else 0.
        operations: operations after that until death; None dies at the next end of a step, when everything is on the disk,
            the record too, and the folder would get its name.
    """

    def __init__(self, output: str, passed: int, operations: int | None) -> None:
        self.output, self.passed, self.operations = output, passed, operations
        self.counts = [0]
        """operations of each step so far"""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not str(args[0]).startswith(self.output + "/"):
            return
        if event == "os.rename" and str(args[0]).endswith(".work"):
            if self.operations is None and len(self.counts) > self.passed:
                os.kill(os.getpid(), signal.SIGKILL)
            self.counts.append(0)
            return
        self.counts[-1] += 1
        if len(self.counts) > self.passed and self.counts[-1] == self.operations:
            os.kill(os.getpid(), signal.SIGKILL)


def cook(output: str, death: tuple[int, int | None] | None) -> None:
    """Run the recipe, or continue it. Steps that begin are in OUTPUT.log, the operations of each step in OUTPUT.counts."""
    import torch

    from rlhf_core import Artifact, Recipe
    from rlhf_core.plugins.registry import Registry
    from rlhf_core.recipe.engine import Engine

    torch.set_num_threads(1)
    count = Death(output, *(death or (0, -1)))
    recipe = Recipe(STEPS, INGREDIENTS, {"policy": Artifact("model", Path("tiny:hidden=16,layers=1"))}, output)
    with Path(f"{output}.log").open("a") as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", log)
        run_in_this_process(patch)
        sys.addaudithook(count)
        Engine(recipe, Registry(), report=lambda line: print(line, file=log, flush=True)).run()
    Path(f"{output}.counts").write_text(json.dumps(count.counts[:-1]))


def outputs_of(output: Path) -> dict[str, Any]:
    """Return, by step, what it is made of and the checksums of what it made; runs hold times and have none."""
    found = {}
    for path in sorted(output.glob("steps/*/step.json")):
        record = json.loads(path.read_text())
        made = {name: each["xxh3"] for name, each in record["outputs"].items() if each["kind"] != "run"}
        found[path.parent.name] = (record["made_of"], made)
    return found
