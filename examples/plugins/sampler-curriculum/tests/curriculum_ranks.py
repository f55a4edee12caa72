"""A reward that follows from a row's number, and the runs that the tests compare: `torchrun … curriculum_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import Reward, RewardOutput, Rollouts, Run, make_config
from rlhf_sampler_curriculum.curriculum import Curriculum

SCORES = (0.0, 0.5, 1.0, 0.25, 0.75, 0.125, 0.875, 1.0)
"""What every completion of a row earns."""


@dataclass(frozen=True)
class ScoreOfRow(Reward):
    """The score of the row, and as reward a little of what the completion is, so that something is learned."""

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        import torch

        row_N = rollouts["row_N"]
        scores_N = torch.tensor(SCORES)[row_N]
        rewards_N = scores_N + 0.01 * rollouts.tokens_NT[:, 0].float()
        powers = {f"row{k}": row_N.float() ** k for k in (1, 2, 3)}  # their means tell which rows there were
        return RewardOutput(rewards_N, scores_N=scores_N, metrics=powers)


def run(folder: Path, **options: Any) -> Run:
    """Run to the end, on eight rows."""
    data = folder / "rows.jsonl"
    if not data.exists():
        data.write_text("\n".join(json.dumps({"prompt": f"Row {i}?"}) for i in range(len(SCORES))), encoding="utf-8")
    usual: dict[str, Any] = {
        "model": "tiny:hidden=32,layers=1",
        "data": {"use": "json", "path": str(data), "encoding": {"template": "raw"}},
        "sampler": Curriculum(),
        "reward": ScoreOfRow(),
        "batch_size": 4,
        "steps": 6,
        "sampling": {"n": 2, "max_new_tokens": 4},
        "actor": {"optim": {"lr": 1e-2}},
    }
    made = Run(make_config("grpo", **{**usual, **options}))
    made.train()
    return made


if __name__ == "__main__":
    run(Path(sys.argv[1]), output=str(Path(sys.argv[1]) / "ranks"))
