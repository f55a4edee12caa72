"""The forms in which a recipe evaluates: an oracle's reward, win rate against the first model, pass@k, and one good of four."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run_in_this_process

from rlhf_core import Artifact, Recipe
from rlhf_core.plugins.registry import Registry
from rlhf_core.recipe.engine import Engine

TINY = "tiny:hidden=16,layers=1"
WORDS = ("alpha", "be", "gamma", "delta")


def write(path: Path, rows: list[dict[str, Any]]) -> Artifact:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Artifact("dataset", path)


def test_a_recipe_evaluates_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_in_this_process(monkeypatch)
    sampling = {"max_new_tokens": 6}
    rows = {"model": "policy", "rows": "rows"}
    ingredients: dict[str, Any] = {
        "rm": {
            "use": "train",
            "reads": {"model": "policy", "data": "pairs"},
            "writes": {"model": "oracle"},
            "settings": {"algorithm": "reward", "steps": 2, "batch_size": 2, "reward": {"optim": {"lr": 1e-2}}},
        },
        "sft": {
            "use": "train",
            "reads": {"model": "policy", "data": "pairs"},
            "writes": {"model": "policy", "state": "sft state", "run": "sft run"},
            "settings": {
                "algorithm": "sft",
                "steps": 2,
                "batch_size": 2,
                "data": {"completion_key": "chosen"},
                "actor": {"optim": {"lr": 1e-2}},
            },
        },
        "oracle_reward": {
            "use": "evaluate",
            "reads": {**rows, "reward": "oracle"},
            "settings": {"evaluator": "heldout", "sampling": sampling, "reward": {"dtype": "float32"}},
        },
        "win_rate": {
            "use": "evaluate",
            "reads": {**rows, "reference": "policy@initial", "reward": "oracle"},
            "settings": {"evaluator": {"use": "win_rate", "prompts": 4}, "sampling": sampling},
        },
        "pass_at_k": {
            "use": "evaluate",
            "reads": rows,
            "settings": {
                "evaluator": {"use": "pass_at_k", "k": 2, "n": 3},
                "reward": {"use": "regex", "pattern": "[a-m]"},
                "sampling": sampling,
            },
        },
        "reward_bench": {"reads": {"rows": "bench", "reward": "oracle"}},
    }
    bench = [{"prompt": word, "chosen": word, "rejected": [word * 2, "x", "yz"], "subset": "words"} for word in WORDS]
    artifacts = {
        "policy": Artifact("model", Path(TINY)),
        "rows": write(tmp_path / "rows.jsonl", [{"prompt": word} for word in WORDS]),
        "pairs": write(tmp_path / "pairs.jsonl", [{"prompt": w, "chosen": w.upper(), "rejected": w} for w in WORDS]),
        "bench": write(tmp_path / "bench.jsonl", bench),
    }
    steps = ["rm", "sft", "oracle_reward", "win_rate", "pass_at_k", "reward_bench"]
    Engine(Recipe(steps, ingredients, artifacts, tmp_path / "out"), Registry(), report=lambda line: None).run()

    def made(step: str) -> dict[str, float]:
        found: dict[str, float] = json.loads((tmp_path / "out" / "steps" / f"t0-{step}" / "metrics.json").read_text())
        return found

    assert made("oracle_reward")["eval/heldout/reward_se"] > 0
    assert (
        0 <= made("win_rate")["eval/win_rate"] <= 1
        and made("win_rate")["eval/win_rate/reward"] != made("win_rate")["eval/win_rate/reward_reference"]
    )
    assert 0 <= made("pass_at_k")["eval/pass@1"] <= made("pass_at_k")["eval/pass@2"] <= 1
    bench_metrics = made("reward_bench")
    assert bench_metrics["prompts"] == 4 and bench_metrics["accuracy"] == bench_metrics["accuracy/words"]
