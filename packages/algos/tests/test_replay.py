"""A recorded step is computed again to the same bits without a model, and what has changed since is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.cli import main
from rlhf_core.run.recording import step_file
from rlhf_core.util.tensor_tree import read_tree, write_tree

REWARD = "def reward_func(queries, prompts, labels):\n    return [sum(map(ord, each)) % 97 / 97 for each in queries]\n"
ONLINE = ["--reward", "func", "--reward.path", "reward.py", "--sampling.n", "2", "--sampling.max-new-tokens", "5"]
RUNS: dict[str, list[str]] = {
    "grpo": ["grpo", *ONLINE, "--algorithm.kl.coef", "0.1"],
    "ppo": ["ppo", *ONLINE, "--update-epochs", "2", "--minibatches", "2", "--micro-tokens", "60"],
    "reinforce++": ["reinforce_pp", *ONLINE, "--minibatches", "1"],
    "best of n": ["rejection_sampling", *ONLINE],
    "repulse": ["repulse", *ONLINE],
    "dpo": ["dpo"],
    "sft": ["sft", "--data.completion-key", "chosen"],
    "reward model": ["reward"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {k}", "chosen": f"{k} it is", "rejected": "no"} for k in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(REWARD)
    return tmp_path


def record(*words: str) -> None:
    """Run two steps, of which the second is recorded."""
    common = ["--model", "tiny", "--data", "json", "--data.path", "rows.jsonl", "--batch-size", "2", "--steps", "2"]
    assert main([*words, *common, "--record-every", "2", "--output", "out", "--report", "False"]) == 0


def change(*path: str, value: Any) -> None:
    """Change one leaf of the record; the last word of `path` is its name."""
    file = step_file(Path("out"), 2)
    tree = read_tree(file)
    place = tree
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value(place[path[-1]])
    write_tree(file, tree)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_the_same_again(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(*RUNS[name])
    assert not step_file(Path("out"), 1).exists()
    for part in ("model", "checkpoints"):  # neither is read
        (folder / "out" / part).rename(folder / part)
    assert main(["replay", "out", "2"]) == 0
    text = capsys.readouterr().out
    assert "numbers of loss" in text and "equal to 1e-9" in text
    assert ("numbers of reward" in text) == ("--reward" in RUNS[name])


def test_the_first_reward_that_has_changed_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(*RUNS["grpo"])
    Path("changed.py").write_text(
        f"{REWARD}\ngiven = reward_func\n\ndef reward_func(queries, prompts, labels):\n"
        "    return [reward + (k == 2) for k, reward in enumerate(given(queries, prompts, labels))]\n"
    )
    Path("other.toml").write_text(Path("out/config.toml").read_text().replace("reward.py", "changed.py"))
    assert main(["replay", "out", "2", "--config", "other.toml"]) == 1
    assert "reward of actor: rewards_N differs first at row 2" in capsys.readouterr().err


def test_the_first_advantage_that_has_changed_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A difference of 1e-8 relative to the number is one, in float64; a record of float32 numbers shows 1e-6."""

    def raised(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[1, 0] += 1e-6
        return values

    record(*RUNS["grpo"])
    (key,) = read_tree(step_file(Path("out"), 2))["credited"]
    change("credited", key, "advantages_NT", value=raised)
    assert main(["replay", "out", "2"]) == 1
    assert "advantages_NT differs first at row 1, token 0" in capsys.readouterr().err


def test_another_option_shows_in_the_loss(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A clip range of zero clips what the second minibatch moved; reward and credit stay."""
    record(*RUNS["ppo"], "--actor.optim.lr", "0.01")
    text = Path("out/config.toml").read_text()
    Path("other.toml").write_text(
        text.replace("clip_low = 0.2", "clip_low = 1e-4").replace("clip_high = 0.2", "clip_high = 1e-4")
    )
    assert main(["replay", "out", "2", "--config", "other.toml"]) == 1
    assert "loss of actor, micro-batch" in capsys.readouterr().err


def test_a_loss_that_was_recorded_as_another_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def raised(losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
        name = next(iter(losses[0]["values"]))
        losses[0]["values"][name] = losses[0]["values"][name] + 1e-3
        return losses

    record(*RUNS["dpo"])
    change("tapes", "actor", "losses", value=raised)
    assert main(["replay", "out", "2"]) == 1
    assert "loss of actor, micro-batch 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "1"], "no record of step 1; it has 2"),
        (["elsewhere", "1"], "--record-every N"),
        (["out", "two"], "STEP must be the number of a step"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step_file(Path("out"), 2).parent.mkdir(parents=True)
    step_file(Path("out"), 2).write_bytes(b"")
    assert main(["replay", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_damaged_record_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_file(Path("out"), 2).parent.mkdir(parents=True)
    step_file(Path("out"), 2).write_bytes(b"not a record")
    assert main(["replay", "out", "2"]) == 2
    assert "is damaged" in capsys.readouterr().err
