"""A policy that is told what to write, and the runs with it that the tests compare: `torchrun … calculator_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import Prompts, Role, Rollout, Rollouts, Run, Sampling, assemble, make_config
from rlhf_environment_calculator.environment import Calculator

EOS = "</s>"


@dataclass(frozen=True)
class Dictated(Rollout):
    """Writes what is dictated. Its log-probabilities are 0: to ask the role for them is collective, and ranks differ in turns.

    Of the completions of a prompt, the even ones ask the calculator, the odd ones guess 9. Hard questions are asked about
    twice.
    """

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        tokenizer: Any = role.tokenizer
        end = int(tokenizer.eos_token_id)
        turns, ends = [], []
        for ids in prompts.token_ids:
            before = str(tokenizer.decode(ids, skip_special_tokens=True))
            for k in range(sampling.n):
                text = write(before, k)
                turns.append([*text.encode(), *([] if text.endswith("=") else [end])])
                ends.append("stop")
        nothing = [[0.0] * len(turn) for turn in turns]
        return assemble(
            prompts, turns, ends, tokenizer, version=role.version, per_token={"sampler_logprobs_NT": nothing}
        )


def write(before: str, k: int) -> str:
    """Return the next turn after `before`."""
    if before.endswith("?"):
        return "9" if k % 2 else "2+3="
    if before.startswith("Hard") and "4*5" not in before:
        return ", 4*5="
    return " so 5"


def run(folder: Path, **options: Any) -> Run:
    """Run to the end, on four exercises of which half are hard."""
    data = folder / "exercises.jsonl"
    if not data.exists():
        rows = [{"prompt": f"{kind} {i}: 2+3?", "label": "5"} for i in range(4) for kind in ("Easy", "Hard")]
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    usual: dict[str, Any] = {
        "model": "tiny:hidden=32,layers=1",
        "data": {"use": "json", "path": str(data), "label_key": "label", "encoding": {"template": "raw"}},
        "environment": Calculator(),
        "rollout": Dictated(),
        "batch_size": 4,
        "steps": 4,
        "sampling": {"n": 2, "max_new_tokens": 40},
        "actor": {"optim": {"lr": 1e-2}},
    }
    made = Run(make_config("grpo", **{**usual, **options}))
    made.train()
    return made


if __name__ == "__main__":
    run(Path(sys.argv[1]), output=str(Path(sys.argv[1]) / "ranks"))
