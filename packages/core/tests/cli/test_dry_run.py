"""`--dry-run` checks options, providers and files of a run or a command, and starts neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

pytest.importorskip("rlhf_algos")


def checked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return the exit code of `rlhf-run WORDS --dry-run` and what it prints."""
    code = main([*words, "--dry-run"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_run_that_can_start_is_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    words = ["sft", "--model", "tiny", "--data", "json", "--data.path", str(rows), "--output", str(tmp_path / "run")]
    assert checked(capsys, *words) == (0, "nothing is missing; the run can start\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("sft --model tiny --data json --data.path absent.jsonl", "absent.jsonl: No such file or directory"),
        ("ppo --model tiny --reward func --reward.path absent.py", "--reward.path absent.py: there is no such file"),
        ("sft --model tiny --learning-rate 1", "unknown flag --learning-rate; write --actor.optim.lr"),
        ("generate --model tiny --data json --data.path absent.jsonl", "absent.jsonl: No such file or directory"),
        ("score", "score needs FILE"),
    ],
)
def test_what_is_missing_is_one_line(line: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = checked(capsys, *line.split())
    assert code == 2 and error in printed and printed.count("\n") == 1, printed


def test_the_output_folder_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grpo", "--model", "tiny", "--reward", "length", "--output", str(tmp_path / "run")]
    (tmp_path / "run").write_text("not a folder")
    assert checked(capsys, *words) == (2, f"rlhf-run: --output {tmp_path / 'run'} is a file; name a folder\n")
    assert "Not a directory" in checked(capsys, *words[:-1], str(tmp_path / "run" / "below"))[1]
    (tmp_path / "run").unlink()
    main([*words, "--steps", "1", "--batch-size", "2", "--sampling.n", "2", "--sampling.max-new-tokens", "4"])
    capsys.readouterr()
    code, printed = checked(capsys, *words)
    assert code == 2 and "already holds a run; add --resume to continue it" in printed
    code, printed = checked(capsys, "--config", str(tmp_path / "run" / "config.toml"), "--resume")
    assert (code, printed) == (0, "nothing is missing; the run can start\n")


def test_missing_files_of_hugging_face_data_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    code, printed = checked(capsys, "sft", "--model", "tiny", "--data", "hf", "--data.path", "owner/set,absent.jsonl")
    assert code == 2 and "absent.jsonl: there is no such file" in printed


def test_a_command_is_not_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "completions.jsonl"
    code, printed = checked(capsys, "generate", "--model", "tiny", "--output", str(output))
    assert (code, printed) == (0, "nothing is missing; generate can start\n") and not output.exists()


def test_the_value_is_true_or_false(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ppo", "--model", "tiny", "--dry-run", "7"]) == 2
    assert "--dry-run expects True or False, not '7'" in capsys.readouterr().err
