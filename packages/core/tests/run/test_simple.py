"""The pipeline of three calls trains as the command line does, evaluates, and returns the numbers that are in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import RLHFConfig, RLHFPipeline, UsageError
from rlhf_core.cli import main

pytest.importorskip("rlhf_algos")
PAIRS = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no, not me"} for n in range(10)]
TINY = "tiny:hidden=16,layers=1"
UNSTEADY = ("time/", "speed/", "memory/")


def config(folder: Path, **options: Any) -> RLHFConfig:
    usual = {"pretrain": TINY, "lr": 1e-2, "batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "max_new_tokens": 4}
    return RLHFConfig(**{**usual, "num_episodes": 2, "output_dir": str(folder), **options})


def history(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of every step that do not depend on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(UNSTEADY)} for row in rows]


def evaluation(folder: Path) -> dict[str, float]:
    """Return the numbers of the last evaluation."""
    return dict(json.loads((folder / "evaluation-metrics.jsonl").read_text().splitlines()[-1]))


def test_the_three_calls_do_what_the_commands_do(tmp_path: Path) -> None:
    rows, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    prompts.write_text("".join(json.dumps({"prompt": pair["prompt"]}) + "\n" for pair in PAIRS))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    pipeline = RLHFPipeline(config(ours, heldout=0.2))
    reward = pipeline.train_reward(PAIRS)
    ppo = pipeline.run_ppo([pair["prompt"] for pair in PAIRS])
    dpo = pipeline.run_dpo(PAIRS, beta=0.3)

    data = f"--model {TINY} --data json --data.heldout 2 --batch-size 4 --eval-every 25 --save-every 50 --seed 0"
    pairs = f"{data} --data.path {rows} --epochs 1"
    assert main(f"reward {pairs} --reward.optim.lr 1e-2 --output {theirs}/reward".split()) == 0
    assert main(f"dpo {pairs} --actor.optim.lr 1e-2 --loss.beta 0.3 --output {theirs}/dpo".split()) == 0
    sampling = (
        "--sampling.n 1 --sampling.max-new-tokens 4 --sampling.temperature 0.7 --sampling.top-p 0.9 --evaluator heldout"
    )
    method = (
        "--algorithm.kl.coef 0.1 --loss.clip-low 0.2 --loss.clip-high 0.2 --update-epochs 2 --minibatches 2 --steps 2"
    )
    model = f"--reward model --reward.model {theirs}/reward/model --actor.optim.lr 1e-2 --output {theirs}/ppo"
    assert main(f"ppo {data} --data.path {prompts} {sampling} {method} {model}".split()) == 0

    for name in ("reward", "dpo", "ppo"):
        assert history(ours / name) == history(theirs / name), name
    measured = evaluation(theirs / "reward")
    assert reward == {
        "accuracy": measured["eval/heldout/accuracy"],
        "loss": measured["eval/heldout/loss"],
        "pairs": 10,
        "model": str(ours / "reward" / "model"),
    }
    assert dpo["loss"] == evaluation(theirs / "dpo")["eval/heldout/loss"]
    assert (dpo["beta"], dpo["pairs"], dpo["method"]) == (0.3, 10, "dpo")
    assert ppo["reward_mean"] == evaluation(theirs / "ppo")["eval/heldout/reward"]
    assert ppo["kl_div"] == history(theirs / "ppo")[-1]["kl/completion"] and ppo["episodes"] == 2


def test_training_teaches_the_preference(tmp_path: Path) -> None:
    """Always the same answer is preferred, so that every held-out pair is told apart after some passes."""
    numbers = RLHFPipeline(config(tmp_path, heldout=0.2)).train_reward(PAIRS, epochs=8)
    assert numbers["accuracy"] == 1.0 and numbers["loss"] < 0.6


def test_a_function_is_a_reward_and_options_win(tmp_path: Path) -> None:
    def ones(completions: list[str], answer: list[str], **columns: object) -> list[float]:
        assert answer == ["x"] * len(completions)
        return [1.0] * len(completions)

    pipeline = RLHFPipeline(config(tmp_path, heldout=0.0))
    numbers = pipeline.run_ppo([{"prompt": "a", "answer": "x"}] * 4, reward=ones, steps=1)
    assert numbers["reward_mean"] == 1.0 and numbers["episodes"] == 1
    assert pipeline.results["ppo"].evaluations == ()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pretrain": ""}, "RLHFConfig needs pretrain=NAME"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"heldout": 1.0}, "heldout must be from 0 to below 1, not 1.0"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=error):
        config(tmp_path, **options)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    pipeline = RLHFPipeline(config(tmp_path))
    with pytest.raises(UsageError, match="run_ppo has no reward: call train_reward first"):
        pipeline.run_ppo(["a", "b"])
    with pytest.raises(UsageError, match="one row has no rejected"):
        pipeline.run_dpo([{"prompt": "a", "chosen": "b"}])
