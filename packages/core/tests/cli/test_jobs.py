"""`generate`, `score` and `eval`: what they write, how they go on after a kill, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

SMALL = ["--model", "tiny", "--prompts", "4", "--sampling.n", "2", "--sampling.max-new-tokens", "3"]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_completions_are_the_same_in_one_go_in_shards_and_after_a_kill(tmp_path: Path) -> None:
    whole, first, second = (tmp_path / name for name in ("whole.jsonl", "0.jsonl", "1.jsonl"))
    assert main(["generate", *SMALL, "--output", str(whole)]) == 0
    expected = lines(whole)
    assert [(line["uid"], line["k"]) for line in expected] == [(u, k) for u in range(4) for k in range(2)]
    assert all(line["finish"] in ("stop", "length") and 1 <= int(str(line["tokens"])) <= 3 for line in expected)

    for shard, file in (("0/2", first), ("1/2", second)):
        assert main(["generate", *SMALL, "--shard", shard, "--batch-size", "1", "--output", str(file)]) == 0
    both = sorted(lines(first) + lines(second), key=lambda line: (line["uid"], line["k"]))
    assert both == expected

    written = whole.read_bytes().split(b"\n")
    whole.write_bytes(b"\n".join([*written[:3], written[3][:20]]))  # a group with one of its two, and half a line
    assert main(["generate", *SMALL, "--output", str(whole)]) == 0
    assert lines(whole) == expected


def test_a_file_of_another_shard_is_not_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    assert main(["generate", *SMALL, "--shard", "1/2", "--output", str(file)]) == 0
    assert main(["generate", *SMALL, "--shard", "0/2", "--output", str(file)]) == 2
    assert "another --shard" in capsys.readouterr().err
    assert main(["generate", "--shard", "2/2"]) == 2
    assert "0 to n - 1" in capsys.readouterr().err


def test_a_file_that_other_options_made_is_not_taken_for_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else another model's completions, or another reward's numbers, would pass for those that were asked for."""
    file = str(tmp_path / "new" / "a.jsonl")  # the folder is made
    one = [
        "generate",
        "--model",
        "tiny",
        "--prompts",
        "1",
        "--sampling.n",
        "1",
        "--sampling.max-new-tokens",
        "2",
        "--output",
        file,
    ]
    assert main(one) == 0
    for option, value in (("seed", "1"), ("model", "tiny:layers=1"), ("sampling.temperature", "0.5")):
        assert main([*one, f"--{option}", value]) == 2
        assert f"a.jsonl was started with another --{option.partition('.')[0]}; name" in capsys.readouterr().err
    free = ["--batch-size", "1", "--data.workers", "0", "--actor.packing", "False"]
    assert main([*one[:4], "2", *one[5:], *free]) == 0, "more rows, and what changes no result"
    assert main(["score", file, "--reward", "length"]) == 0
    assert main(["score", file, "--reward", "length", "--reward.target", "9"]) == 2
    assert "a.scored.jsonl was started with another --reward" in capsys.readouterr().err
    assert main([*one[:-1], str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_any_reward_scores_a_file_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Length reward in characters, target 4: -|characters - 4| / 4, worked by hand."""
    file, scored = tmp_path / "a.jsonl", tmp_path / "a.scored.jsonl"
    texts = ["four", "sixsix", "", "to"]
    file.write_text("".join(json.dumps({"prompt": "p", "completion": text, "extra": 1}) + "\n" for text in texts))
    command = ["score", str(file), "--reward", "length", "--reward.target", "4", "--reward.unit", "characters"]
    assert main([*command, "--batch-size", "3"]) == 0
    assert [line["reward"] for line in lines(scored)] == [0.0, -0.5, -1.0, -0.5]
    assert all(line["extra"] == 1 for line in lines(scored))
    complete = scored.read_bytes()
    scored.write_bytes(complete[:-5])
    assert main(command) == 0
    assert scored.read_bytes() == complete


def test_what_cannot_be_scored_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n')
    assert main(["score", str(file), "--reward", "length"]) == 2
    assert "a.jsonl:2: expected an object" in capsys.readouterr().err
    assert main(["score", str(file)]) == 2
    assert "score needs --reward NAME" in capsys.readouterr().err
    assert main(["score", "--reward", "length"]) == 2
    assert "score needs FILE" in capsys.readouterr().err


def test_evaluators_run_on_a_model_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--evaluator.prompts", "2", "--sampling.max-new-tokens", "3", "--output", str(tmp_path / "e")]
    assert main(["eval", "tiny", "--evaluator", "heldout", "--reward", "length", *flags]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert -1 <= metrics["eval/heldout/reward"] <= 0 and 1 <= metrics["eval/heldout/length"] <= 3
    assert main(["eval", "tiny", "--evaluator", "heldout", *flags]) == 2
    assert "pass --reward NAME" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["generate", "score", "eval"])
def test_help_shows_the_flags_of_the_chosen_providers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = {"generate": "rollout", "score": "reward", "eval": "reward"}[name]
    chosen = {"generate": [], "score": ["--reward", "length"], "eval": ["--reward", "length"]}[name]
    assert main([name, "--help", *chosen]) == 0
    shown = capsys.readouterr().out
    assert f"usage: rlhf-run {name}" in shown and f"--{kind}." in shown
