"""Ranks of the tests of tensor parallelism: runs of a model whose heads two ranks divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed_ranks as ranks
import torch

from rlhf_core.launcher.local import join_world

WIDE = "tiny:heads=4,kv_heads=2"


def run(folder: Path, case: str, strategy: Any, name: str, **options: Any) -> dict[str, Any]:
    """Run a case with that model."""
    return ranks.run(folder, case, strategy, name, model=WIDE, **options)


def main(folder: Path, *words: str) -> None:
    """Each word is CASE:STAGE, which runs and then resumes in its middle."""
    torch.set_num_threads(1)
    world = join_world()
    for word in words:
        case, stage = word.split(":")
        name = word.replace(":", "-")
        result = run(folder, case, ranks.sharded(stage), name)
        result["resumed"] = ranks.resumed(folder, case, ranks.sharded(stage), name, model=WIDE)
        if world.rank == 0:
            torch.save(result, folder / f"{name}.pt")
