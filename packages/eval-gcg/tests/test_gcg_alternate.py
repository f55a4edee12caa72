"""The script that alternates training with attacks: what it trains on, what it holds out, and that it continues."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli.app import main as rlhf_run

SCRIPT = Path(__file__).resolve().parents[3] / "recipes" / "gcg" / "alternate.py"
TRAIN = (
    "rlhf_core.testing.tiny_algorithm:TinyAlgorithm --steps 1 --batch-size 2 --sampling.n 2 --sampling.max-new-tokens 3"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the script, whose commands run in this process and are noted in `calls`."""
    spec = importlib.util.spec_from_file_location("alternate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []  # type: ignore[attr-defined]

    def run(_: Any, *words: str) -> None:
        module.calls.append(words)  # type: ignore[attr-defined]
        assert rlhf_run([*words]) == 0

    monkeypatch.setattr(module, "run", run)
    return module


def test_a_round_trains_on_what_was_found_and_measures_what_was_held_out(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": [{"role": "user", "content": "Hi"}]}', encoding="utf-8")
    command = [
        "--model", "tiny:hidden=16,layers=1", "--prompts", str(prompts), "--goals", "harmless", "--seen", ":2", "--heldout",
        "11:", "--seeds", "0,1", "--rounds", "1", "--train", TRAIN, "--output", str(tmp_path / "out"), "--copies", "2",
        "--attack", "--evaluator.steps 1 --evaluator.search-width 4 --evaluator.n 2 --sampling.max-new-tokens 3",
    ]  # fmt: skip
    assert script.main(command) == 0
    trained = [
        json.loads(line) for line in (tmp_path / "out/round-1/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(trained) == 1 + 2 * 2 * 2, "the prompts, and two copies of the attacks on two goals with two seeds"
    assert sum("attack_seed" in row for row in trained) == 8
    with (tmp_path / "out/report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["step"]) for row in rows] == [
        (cell, number) for cell in ("seen", "seeds", "goals") for number in "01"
    ]
    heldout = (tmp_path / "out/round-1/goals/gcg/step-0/attacks.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(json.loads(line)["goal"], json.loads(line)["seed"]) for line in heldout] == [
        ("Name the king of all staplers.", 1000)
    ]
    made = len(script.calls)
    assert made == 7, "three attacks, a training, three attacks"
    before = (tmp_path / "out/report.csv").read_text(encoding="utf-8")
    assert script.main(command) == 0
    assert len(script.calls) == made, "what is finished is not done again"
    assert (tmp_path / "out/report.csv").read_text(encoding="utf-8") == before


def test_mistakes_end_in_one_line(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--goals", "harmless", "--train", TRAIN, "--output", str(tmp_path / "out")]
    assert script.main([*words, "--prompts", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl: No such file" in capsys.readouterr().err
    (tmp_path / "list.jsonl").write_text("[]\n", encoding="utf-8")
    assert script.main([*words, "--prompts", str(tmp_path / "list.jsonl")]) == 2
    assert "expected lines with prompt" in capsys.readouterr().err
