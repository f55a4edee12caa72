"""Messages to the user during a run and at its end."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.contract.options import Sampling
from rlhf_core.observer.console import evaluation_samples, evaluation_table, step_line, truncation


def test_a_step_is_one_line_with_what_moves_its_rate_and_the_time_left() -> None:
    metrics = {"reward/mean": 0.25, "kl/mean": 0.01, "loss/actor": -0.5, "tokens": 300.0, "time/step": 2.0}
    assert step_line(7, 20, metrics, 125.9) == (
        "step  7/20  reward +0.250  kl 0.0100  loss/actor -0.5000  150 tokens/s  2:05 left"
    )


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    metrics = {"kl/mean": -1e-9, "loss/actor": -1e-9, "tokens": 300.0, "time/step": 2.0}
    assert step_line(1, 2, metrics, 0) == "step 1/2  kl 0.0000  loss/actor 0.0000  150 tokens/s  0:00 left"


def test_a_step_shows_what_it_is_judged_by() -> None:
    common = {"tokens": 300.0, "time/step": 2.0}
    online = {"reward/mean": 0.25, "reward/variance": 0.09, "lr/actor": 1e-5, "lr/critic": 2e-5, **common}
    assert step_line(7, 20, online, 3725) == (
        "step  7/20  reward +0.250 ± 0.300  lr/actor 1e-05  lr/critic 2e-05  150 tokens/s  1:02:05 left"
    )
    pairs = {"reward/accuracy": 0.75, "reward/margin": 1.5, "reward/accuracy/web": 1.0, "loss/reward": 0.5, **common}
    assert step_line(7, 20, {**pairs, "data/epoch": 0.35, "lr/reward": 2.5e-6}, 0) == (
        "step  7/20  accuracy 0.750  margin 1.500  loss/reward 0.5000  lr 2.5e-06  epoch 0.35  150 tokens/s  0:00 left"
    )


def test_the_table_shows_standard_errors_and_differences() -> None:
    before = (0, {"eval/heldout/reward": 0.35, "eval/heldout/reward_se": 0.05, "eval/heldout/length": 31.0})
    after = (20, {"eval/heldout/reward": 0.6, "eval/heldout/reward_se": 0.04, "eval/heldout/length": 32.0})
    assert evaluation_table(before, after).splitlines() == [
        "                step 0         step 20        difference",
        "heldout/reward  0.350 ± 0.050  0.600 ± 0.040  +0.250",
        "heldout/length  31.000         32.000         +1.000",
    ]


def test_answers_to_the_same_prompt_stand_together_first_and_last(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "prompt": "<user>A?", "question": "A?", "completion": "no\nway", "reward": -0.5},
        {"step": 5, "prompt": "<user>A?", "question": "A?", "completion": "perhaps", "reward": 0.0},
        {"step": 9, "prompt": "<user>A?", "question": "A?", "completion": "y" * 300, "reward": 0.5},
    ]
    path = tmp_path / "evaluations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation_samples(path).splitlines() == [
        "prompt: A?",
        "  step 0 (-0.50): no way",
        f"  step 9 (+0.50): {'y' * 199}…",
    ]
    assert evaluation_samples(tmp_path / "absent.jsonl") == ""


def test_a_run_says_at_its_start_that_cutting_the_distribution_biases_ratios() -> None:
    assert truncation(Sampling()) == ""
    assert truncation(Sampling(temperature=0.0, top_p=0.9)) == "", "greedy sampling has no ratios to bias"
    assert truncation(Sampling(top_p=0.9, top_k=40)) == "", "what was kept is replayed"
    said = truncation(Sampling(top_p=0.9, top_k=40, replay="off"))
    assert said.startswith("sampling is truncated by top-p 0.9, top-k 40, but importance ratios") and "\n" not in said


def test_lines_that_are_no_answers_are_not_shown_and_do_not_end_a_run_that_is_over(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(b'3\nnonsense\n\xff\n{"step": 0, "note": "of another evaluator"}\n' + b"[" * 99_999 + b"\n")
    assert evaluation_samples(path) == ""
