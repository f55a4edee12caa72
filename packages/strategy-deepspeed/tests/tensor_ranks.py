"""Ranks of the tests of tensor parallelism: runs of a model whose heads two ranks divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed_ranks as ranks
import torch

from rlhf_core.launcher.local import join_world

SHORT: dict[str, Any] = {"model": "tiny:heads=4,kv_heads=2", "steps": 6, "save_every": 3}

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "averaged": ("sft", {"actor": {**ranks.ACTOR, "ema": 0.5}}),
    "tracked": ("grpo", {"reference": {"track": {"of": "actor", "every": 1, "decay": 0.5}}}),
}
"""Cases with options of their own, by name: the case of `deepspeed_ranks`, and the options."""


def run(folder: Path, case: str, strategy: Any, name: str) -> dict[str, Any]:
    """Run a case to its end."""
    case, options = MORE.get(case, (case, {}))
    return ranks.run(folder, case, strategy, name, **SHORT, **options)


def resumed(folder: Path, case: str, strategy: Any, name: str, copy: str = "") -> dict[str, Any]:
    """Run a case again from its checkpoint in the middle, in a copy of its folder."""
    case, options = MORE.get(case, (case, {}))
    return ranks.resumed(folder, case, strategy, name, copy, **SHORT, **options)


def main(folder: Path, *words: str) -> None:
    """Each word is CASE:STAGE, which runs and is resumed in its middle; or CASE:FOLDER:STAGE, which resumes what is there."""
    torch.set_num_threads(1)
    world = join_world()
    for word in words:
        case, *old, stage = word.split(":")
        name, strategy = word.replace(":", "-"), ranks.sharded(stage)
        if old:
            result = resumed(folder, case, strategy, old[0], name)
        else:
            result = run(folder, case, strategy, name)
            result["resumed"] = resumed(folder, case, strategy, name)
        if world.rank == 0:
            torch.save(result, folder / f"{name}.pt")
