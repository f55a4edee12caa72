"""A run on rows of unlike lengths, which writes how many tokens each rank trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from rlhf_core import make_config
from rlhf_core.launcher.local import join_world
from rlhf_core.run.run import Run

SKEWED = {"steps": 3, "batch_size": 8, "model": "tiny", "max_prompt_tokens": 512}


def write_data(folder: Path) -> str:
    """Rows of which one in four is long."""
    dice = random.Random(1)
    lengths = [dice.randint(60, 90) if i % 4 == 0 else dice.randint(1, 4) for i in range(24)]
    rows = [
        {"prompt": f"a b {i}", "label": i % 2 == 0, "completion": "c " * length} for i, length in enumerate(lengths)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def run_skewed(data: str, output: str, algorithm: str = "sft", **given: Any) -> None:
    """Train on rows of data, and write each rank's tokens in each step, and those of its longest row."""
    torch.set_num_threads(1)
    world = join_world()
    seen: list[Any] = []

    class Counting(Run):
        def finish(self, iteration: Any, credited: Any) -> None:
            super().finish(iteration, credited)
            (batch,) = iteration.batches.values()
            lengths = (batch.prompt_lengths_N + batch.lengths_N).tolist()
            seen.append(self.world.gather((sum(lengths), max(lengths, default=0))))

    options: dict[str, Any] = {"actor": {"optim": {"lr": 1e-3, "eps": 1e-4}}, "data": {"use": "json", "path": data}}
    run = Counting(make_config(algorithm, **{**SKEWED, **options, **given}, output=output))
    run.train()
    weights = {name: tensor.clone() for name, tensor in run.roles["actor"].weights()}
    if world.rank == 0:
        torch.save({"seen": seen, "weights": weights}, f"{output}.pt")


CASES: dict[str, dict[str, Any]] = {
    "sft": {},
    "few": {"batch_size": 2},
    "kto": {"algorithm": "kto", "batch_size": 6},
    "fewkto": {"algorithm": "kto", "batch_size": 2, "seed": 3},
}
"""Options of each run; three ranks share a batch, and where it is of two rows, one of them has none."""


def run_all(data: str, output: str) -> None:
    """Make every run."""
    for name, given in CASES.items():
        run_skewed(data, f"{output}-{name}", **given)
