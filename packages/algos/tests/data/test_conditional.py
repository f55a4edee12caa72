"""Conditional fine-tuning: what a prompt says, on which scale, and that a run asks for what it was trained on."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from rlhf_algos.data.conditional import ConditionalData
from rlhf_core import Run, make_config
from rlhf_core.cli import main
from rlhf_core.errors import DataError, UsageError
from rlhf_core.testing import check_data


def scored(path: Path) -> str:
    """A file as `rlhf-run score` leaves it; the last prompt is a chat."""
    lines = [{"prompt": f"q{i}", "completion": "a" * (i + 1), "reward": r} for i, r in enumerate((1.0, 2.5, -4.0))]
    chat = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "last"},
    ]
    lines.append({"prompt": chat, "completion": "b", "reward": 0.125})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_prompt_says_the_reward_with_two_decimals(tmp_path: Path) -> None:
    rows = ConditionalData(scored(tmp_path / "rows.jsonl"))("train")
    assert [row.prompt for row in rows[:3]] == ["q0 <rm_score>: 1.00 ", "q1 <rm_score>: 2.50 ", "q2 <rm_score>: -4.00 "]
    assert [turn["content"] for turn in rows[3].prompt] == ["first", "x", "last <rm_score>: 0.12 "]
    assert rows[0].completions == ("a",)
    check_data(ConditionalData(scored(tmp_path / "rows.jsonl")))


def test_normalized_rewards_are_on_the_scale_of_the_training_rows(tmp_path: Path) -> None:
    path = scored(tmp_path / "rows.jsonl")
    rewards = [1.0, 2.5, -4.0, 0.125]
    rows = ConditionalData(path, normalize=True, condition="{reward}|{prompt}")("train")
    expected = [(r - statistics.mean(rewards)) / statistics.stdev(rewards) for r in rewards]
    assert [row.prompt for row in rows[:3]] == [f"{value:.2f}|q{i}" for i, value in enumerate(expected[:3])]


def test_a_target_is_said_of_every_row_and_rows_need_no_reward(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    assert ConditionalData(str(path), target=5.0)("train")[0].prompt == "hello <rm_score>: 5.00 "
    with pytest.raises(DataError, match="expected a column 'reward'"):
        ConditionalData(str(path))("train")
    with pytest.raises(UsageError, match="condition must contain {reward}"):
        ConditionalData(str(path), condition="{prompt}")


def test_a_run_learns_to_answer_as_the_reward_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Completions of reward 1 are "a", of 0 "b", to the same prompt; asked for 1 the model says "a"."""
    lines = [{"prompt": "q", "completion": "ab"[i % 2], "reward": float(i % 2 == 0)} for i in range(32)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"path": str(data), "condition": "{prompt}{reward}", "encoding": {"template": "raw"}}
    config = make_config(
        "csft", model="tiny:hidden=32,layers=1", data={"use": "conditional", **options}, batch_size=16, steps=50,
        actor={"optim": {"lr": 0.02, "schedule": "constant"}}, output=str(tmp_path / "run"),
    )  # fmt: skip
    assert Run(config).train().metrics["loss/actor"] < 0.15, "without the reward it would stay at log(2) / 2 = 0.35"
    words = ["generate", "--model", str(tmp_path / "run" / "model"), "--data", "conditional", "--data.path", str(data)]
    words += ["--data.condition", "{prompt}{reward}", "--data.encoding.template", "raw", "--sampling.n", "1"]
    for target, answer in (("1", "a"), ("0", "b")):
        output = tmp_path / f"{target}.jsonl"
        assert main([*words, "--data.target", target, "--prompts", "8", "--output", str(output)]) == 0
        said = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
        assert said.count(answer) >= 7
    capsys.readouterr()
