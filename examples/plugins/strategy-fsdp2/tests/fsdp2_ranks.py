"""One rank of the runs that the tests compare: `torchrun … fsdp2_ranks.py FOLDER`.

Every case runs under strategy `torch` and under `fsdp2`, in FOLDER/CASE-STRATEGY. `resume` runs to the end, and again from its
checkpoint in the middle.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf_core import Run, make_config

STEPS = 3
ACTOR = {"optim": {"lr": 1e-3, "max_grad_norm": 0.5, "weight_decay": 0.1}}
ONLINE: dict[str, Any] = {"batch_size": 4, "sampling": {"n": 2, "max_new_tokens": 6}, "reward": "length"}
KL_GRPO = {"use": "grpo", "kl": {"coef": 0.1}}  # its reference is the actor without adapters
EPISODES: dict[str, Any] = {  # ranks sample different numbers of turns from the gathered weights
    "environment": "rlhf_core.testing.tiny_environment:TinyEnvironment",
    "reward": "environment",
    "sampling": {"n": 2, "max_new_tokens": 24},
    "episode": {"turn_tokens": 3},
}
MEMORYLESS = {"use": "omd_memoryless", "lr": 0.05, "damping_strategy": "constant", "damping": 2.0}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": ("grpo", {**ONLINE, "actor": {**ACTOR, "ema": 0.5}}),
    "ppo": ("ppo", {**ONLINE, "actor": ACTOR, "critic": ACTOR, "update_epochs": 2}),
    "reward": ("reward", {"batch_size": 4, "reward": ACTOR}),
    "dpo": ("dpo", {"batch_size": 4, "actor": ACTOR}),
    "distill": ("distill", {"batch_size": 4, "actor": ACTOR, "teacher": {"model": "tiny:layers=1"}}),
    "lora": (KL_GRPO, {**ONLINE, "actor": {**ACTOR, "ema": 0.5, "lora": {"rank": 4}}}),
    "tracking": (
        KL_GRPO,
        {**ONLINE, "actor": ACTOR, "reference": {"track": {"of": "actor", "every": 2, "decay": 0.5}}},
    ),
    "episodes": ("grpo", {**ONLINE, **EPISODES, "actor": ACTOR}),
    "omd": ("reward", {"batch_size": 4, "reward": {"freeze": ["body"], "optim": {"use": "omd"}}}),
    "memoryless": ("reward", {"batch_size": 4, "reward": {"optim": MEMORYLESS}}),
    "bf16": ("grpo", {**ONLINE, "actor": {**ACTOR, "dtype": "bfloat16"}}),
}
"""Algorithm and options of each case."""


DATA = "pairs.jsonl"


def write_data(folder: Path) -> None:
    """Write pairs, whose chosen answers also serve as completions. For the process that starts the ranks."""
    words = "the cat sat on a mat and saw one big red dog run far away from home".split()
    rows = []
    for i in range(16):
        prompt, chosen, rejected = (" ".join(words[(i * k) % 9 :][: 1 + i % k]) for k in (3, 4, 5))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "completion": chosen})
    (folder / DATA).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def run(folder: Path, case: str, strategy: str, name: str, **options: Any) -> None:
    """Run `case` to the end."""
    algorithm, own = CASES[case]
    shared: dict[str, Any] = {"model": "tiny", "steps": STEPS, "micro_tokens": 128, "strategy": strategy}
    shared["output"] = str(folder / name)
    if "reward" not in own or algorithm == "reward":
        shared["data"] = {"use": "json", "path": str(folder / DATA)}
    Run(make_config(algorithm, **{**shared, **own, **options})).train()


def main(folder: Path, cases: list[str]) -> None:
    """Run all cases, or those that are named."""
    for case in cases or CASES:
        for strategy in ("torch", "fsdp2"):
            run(folder, case, strategy, f"{case}-{strategy}")
    for case in ("grpo", "lora", "omd"):
        halves = {"steps": 4, "save_every": 2}
        run(folder, case, "fsdp2", f"{case}-straight", **halves)
        if os.environ["RANK"] == "0":
            shutil.copytree(folder / f"{case}-straight", folder / f"{case}-resumed")
            shutil.rmtree(folder / f"{case}-resumed" / "checkpoints" / "step-4")
        torch.distributed.barrier()
        run(folder, case, "fsdp2", f"{case}-resumed", **halves, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
