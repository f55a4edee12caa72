"""Runs with fewer prompts than ranks, or than groups of ranks that share rows, under several stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed_ranks as ranks
import torch

from rlhf_core.evaluator.heldout import Heldout
from rlhf_core.launcher.local import join_world

MODEL = "tiny:heads=4,kv_heads=2"


def run_few(folder: str, strategy: Any, name: str) -> dict[str, Any]:
    """Train on one prompt per step, with a value head and the kept sets of truncated sampling, and evaluate on one prompt."""
    return ranks.run(
        Path(folder),
        "plain",
        strategy,
        name,
        model=MODEL,
        steps=3,
        batch_size=1,
        save_every=0,
        sampling={"n": 3, "max_new_tokens": 6, "top_p": 0.8},
        evaluator=[Heldout(prompts=1, n=2)],
        eval_every=2,
    )


def main(folder: str, *words: str) -> None:
    """Each word is a stage with its letters; what it gave is in FOLDER/STAGE.pt."""
    torch.set_num_threads(1)
    world = join_world()
    for word in words:
        result = run_few(folder, ranks.sharded(word), word)
        if torch.distributed.get_rank() == 0:
            torch.save(result, Path(folder, f"{word}.pt"))
    world.barrier()
