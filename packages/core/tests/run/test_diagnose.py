"""Twelve faults planted in a rollout engine are named by `rlhf-run diagnose`; sound engines are not accused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

FAULTS = [
    "shift by one",
    "temperature",
    "truncation",
    "truncation, top-p",
    "end token",
    "repetition penalty",
    "tokenizer",
    "template",
    "template, twice",
    "prompt cut",
    "padding",
    "dtype",
]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Prompts of different lengths, the shortest of 20 bytes."""
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": "Tell me about rivers" + " and lakes" * k} for k in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return "rows.jsonl"


def diagnose(rows: str, *flags: str) -> int:
    return main(["diagnose", "tiny", "--data", "json", "--data.path", rows, "--prompts", "4", "--tokens", "10", *flags])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    exact = ["--max-difference", "1e-5"] if fault == "dtype" else []  # the distributions of a random model are flat
    assert diagnose(rows, "--rollout", "planted:Planted", "--rollout.fault", fault, *exact) == 1
    text = capsys.readouterr().out
    assert f"cause: {fault.partition(',')[0]}\n" in text.partition("after new weights")[0], text


@pytest.mark.parametrize(
    ("fault", "part"), [("stale weights", "all weights"), ("stale weights, one layer", "layers.1")]
)
def test_weights_that_did_not_arrive_are_named(
    fault: str, part: str, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert diagnose(rows, "--rollout", "planted:Planted", "--rollout.fault", fault) == 1
    text = capsys.readouterr().out
    assert "as loaded: agree" in text
    assert "cause: stale weights" in text and f"old weights of {part};" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["hf", "planted:Planted"])
def test_a_sound_engine_is_not_accused(engine: str, dtype: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The planted engine without a fault computes in float32: against a trainer in bfloat16 it differs by rounding."""
    assert diagnose(rows, "--rollout", engine, "--actor.dtype", dtype) == 0
    assert capsys.readouterr().out.count("agree") == 2


def test_faults_are_named_in_bfloat16_too(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        diagnose(rows, "--rollout", "planted:Planted", "--rollout.fault", "truncation", "--actor.dtype", "bfloat16")
        == 1
    )
    assert "cause: truncation" in capsys.readouterr().out
