"""`benchmarks/chaos.py` continues where it was stopped, and a run that failed is a row of its table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[4]
FAKE = """
import json, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed = int(words["--seeds"])
print("Ray says something")
if seed == 1:
    sys.exit("the cluster did not start")
if seed == 2:
    time.sleep(600)
faults = [
    {"what": "engine 0", "signal": "SIGKILL", "step": 4, "engines": 1, "roles": 0},
    {"what": "node", "step": 9, "engines": 1, "roles": 1},
]
found = {"seed": seed, "injected": faults, "roles": 1, "engines": 2 if seed == 0 else 1, "seconds": 30.0}
print(json.dumps({**found, "difference": 0.0, "same_uids": True}))
"""


@pytest.fixture
def chaos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    script = tmp_path / "fake.py"
    script.write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(module, "SCRIPT", script)
    return module


def call(chaos: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["chaos.py", *words])
    try:
        chaos.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_runs_that_were_made_are_not_made_again_and_failures_are_rows(
    chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output", str(tmp_path / "out")]
    assert call(chaos, monkeypatch, *words, "--runs", "1") == 0
    assert "1 of 1 runs ended as they must; 3 recoveries of 10 s each on average." in capsys.readouterr().out
    log = tmp_path / "out" / "runs.jsonl"
    first = log.read_text().splitlines()[0]
    with log.open("a") as file:
        file.write('{"seed": 1, "st')  # killed while it wrote
        file.write("\n")
    assert call(chaos, monkeypatch, *words, "--runs", "2") == 1
    assert call(chaos, monkeypatch, *words, "--runs", "3", "--deadline", "2") == 1, (
        "the third one would wait for ten minutes"
    )
    capsys.readouterr()
    assert call(chaos, monkeypatch, *words, "--runs", "4") == 1
    lines = log.read_text().splitlines()
    assert lines[0] == first and [json.loads(line)["seed"] for line in (lines[0], *lines[2:])] == [0, 1, 2, 3]
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| 0 | 60 | engine 0 SIGKILL in step 5; node lost in step 10 | 1, 2 | 30 |")
    outcomes = [line.split("|")[-2].strip() for line in table[2:6]]
    assert outcomes == [
        "ended",
        "exit code 1: the cluster did not start",
        "did not end in 2 s",
        "recoveries of engines differ from faults",
    ]
    assert table[-1].startswith("1 of 4 runs ended as they must")
