"""Runs in occupied folders: a one-line error, and the user's files stay unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

WORDS = "ppo --model tiny:hidden=8,layers=1 --data json --data.path train.jsonl --reward length --steps 1 --output run"
ROWS = "".join(json.dumps({"prompt": word}) + "\n" for word in ("alpha", "be", "gamma ray", "d"))
PLACES: dict[str, tuple[dict[str, str], str, str]] = {
    "a folder of sources": ({"run/model/train.py": "mine"}, "", "run/model exists and is not a file of this run"),
    "the model that is read": ({"run/model/config.json": "{}"}, "--model run/model", "run/model"),
    "the folder of the model that is read": (
        {"run/config.json": "{}"},
        "--model run",
        "--model run is a path that the run would overwrite",
    ),
    "the rows that are read": (
        {"run/samples.jsonl": ROWS},
        "--data.path run/samples.jsonl",
        "run/samples.jsonl",
    ),
    "the configuration that is read": (
        {"run/config.toml": "seed = 1"},
        "--config run/config.toml",
        "run/config.toml exists",
    ),
    "metrics of something else": (
        {"run/metrics.jsonl": "{}"},
        "",
        "run/metrics.jsonl exists and is not a file of this run",
    ),
    "checkpoints of something else": ({"run/checkpoints/step-1/w": "mine"}, "", "run/checkpoints exists"),
    "a moving average": ({"run/model-ema/w": "mine"}, "", "run/model-ema exists"),
    "what would be a temporary folder": ({"run/.model.tmp/w": "mine"}, "", "run/.model.tmp exists"),
    "what would be an old folder": ({"run/.model.old/w": "mine"}, "", "run/.model.old exists"),
    "a manifest of something else": ({"run/run.json": "{}"}, "", "run/run.json exists"),
    "events of another run": ({"run/tensorboard/events": "mine"}, "--observer tensorboard", "run/tensorboard exists"),
    "alarms of another run": ({"run/alarms.jsonl": "mine"}, "--observer alarm", "run/alarms.jsonl exists"),
    "evaluations of another run": (
        {"run/evaluations.jsonl": "mine"},
        "--evaluator heldout",
        "run/evaluations.jsonl exists",
    ),
    "a link to rows": (
        {"train.jsonl": ROWS, "run/x": ""},
        "link run/metrics.jsonl x",
        "run/metrics.jsonl is a link",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_a_run_would_write_over_is_refused_before_anything_is_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, more, message = PLACES[case]
    if "tensorboard" in more:
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    for name, content in {"train.jsonl": ROWS, **files}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    if more.startswith("link "):
        _, link, target = more.split()
        Path(link).symlink_to(target)
        more = ""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*WORDS.split(), *more.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlhf-run: ")]
    assert len(lines) == 1 and message in lines[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
