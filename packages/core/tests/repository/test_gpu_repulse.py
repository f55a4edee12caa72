"""`benchmarks/gpu_repulse.py` runs from the source tree, keeps what it has, and its model travels in parts."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("rlhf_algos")

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of `benchmarks/` by its name, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def rehearse(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_repulse.py"), "--rehearse", "--output", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "state.jsonl").read_text().splitlines()
    return {record["run"]: record for record in map(json.loads, lines)}


def test_a_study_is_made_and_continued_without_repeating_a_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = rehearse(tmp_path / "first", "--methods", "repulse")
    assert first.returncode == 0, first.stderr
    (made,) = records(tmp_path / "first").values()
    assert made["finished"]
    assert made["reward"][-1][0] == 160  # ten steps of 8 samples of policy and proposal
    assert [samples for samples, _ in made["logprob"]] == [16.0 * step for step in range(11)]
    assert "| RePULSe | " in (tmp_path / "first" / "repulse.md").read_text()
    assert (tmp_path / "first" / "repulse.svg").stat().st_size > 1000

    both = rehearse(tmp_path / "second", "--earlier", str(tmp_path / "first" / "state.jsonl"), "--minutes", "0")
    assert both.returncode == 0, both.stderr
    assert records(tmp_path / "second") == {"repulse-seed0": made}
    assert json.loads((tmp_path / "second" / "repulse.json").read_text())["runs"] == [made]


def test_a_run_that_does_not_end_in_time_is_cut_and_said_to_be(script: Any, tmp_path: Path) -> None:
    """A run that is far too long for any machine: it is cut whether it has begun to train or not."""
    study, timed = script("gpu_repulse"), script("timed_runs")
    samples = {"n": 8, "samples": 10**8, "model": "tiny"}
    options = Namespace(**samples, rehearse=True, seeds=1, methods=["reinforce"], output=tmp_path)

    def write(records: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        study.write_pages(records, {**facts, **samples}, options)

    assert timed.TimedRuns(tmp_path, study.plan(options), 1, 0.2, study.read_points, write).run()
    (cut,) = records(tmp_path).values()
    assert (cut["finished"], cut["cut"], cut["error"]) == (False, True, "")
    assert "| reinforce-seed0 | cut |" in (tmp_path / "repulse.md").read_text()


def test_a_run_that_fails_leaves_its_last_words_on_the_page(script: Any, tmp_path: Path) -> None:
    timed = script("timed_runs")
    planned = timed.Planned("odd-seed0", "odd", 0, {"algorithm": "grpo", "model": "tiny", "stepz": 1})
    page: list[Any] = []
    runs = timed.TimedRuns(tmp_path, [planned], 1, 2, lambda member: {}, lambda found, facts: page.append(found))
    assert not runs.run()
    assert "stepz" in page[-1][0]["error"]


def test_a_state_of_other_settings_is_refused(script: Any, tmp_path: Path) -> None:
    timed = script("timed_runs")
    one, other = (timed.Planned("a-seed0", "a", 0, {"steps": steps}) for steps in (1, 2))
    (tmp_path / "state.jsonl").write_text(json.dumps({"run": "a-seed0", "key": one.key, "finished": True}) + "\n")
    with pytest.raises(SystemExit, match="a-seed0 had other settings"):
        timed.TimedRuns(tmp_path, [other], 1, 1, dict, print)


def test_the_interval_of_three_seeds_is_students(script: Any) -> None:
    page = script("gpu_repulse_page")
    runs = [{"logprob": [[0, 0.0], [50, -value], [100, -9.0]]} for value in (1.0, 2.0, 3.0)]
    mean, half, seeds = page.interval_at(runs, "logprob", 60)
    assert (mean, seeds) == (-2.0, 3)
    assert half == pytest.approx(4.302653 / 3**0.5, abs=1e-5)  # t of 2 degrees of freedom, deviation 1
    assert page.interval_at(runs, "logprob", 200) is None


def test_a_model_travels_in_parts_that_need_not_be_there_together(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry = script("gpu_model")
    content = bytes(range(256)) * 9
    (tmp_path / "some.gguf").write_bytes(content)
    unpacked: list[bytes] = []
    monkeypatch.setattr(carry, "unpack", lambda file, folder: unpacked.append(file.read_bytes()))
    carry.split(str(tmp_path / "some.gguf"), tmp_path / "parts", 1000, 700)
    assert [len(next(folder.glob("part-*")).read_bytes()) for folder in sorted((tmp_path / "parts").iterdir())] == [
        1000, 700, 604,
    ]  # fmt: skip
    for i, code in ((2, carry.INCOMPLETE), (0, carry.INCOMPLETE), (1, 0)):
        there = tmp_path / f"call-{i}"
        there.mkdir()
        (tmp_path / "parts" / str(i)).rename(there / str(i))
        assert carry.join(there, tmp_path / "model") == code
    assert hashlib.sha256(unpacked[0]).digest() == hashlib.sha256(content).digest()


def test_a_damaged_part_is_no_model(script: Any, tmp_path: Path) -> None:
    carry = script("gpu_model")
    (tmp_path / "some.gguf").write_bytes(b"weights" * 100)
    carry.split(str(tmp_path / "some.gguf"), tmp_path / "parts", 400, 400)
    (tmp_path / "parts" / "1" / "part-1").write_bytes(b"other")
    with pytest.raises(SystemExit, match="differ from the model"):
        carry.join(tmp_path / "parts", tmp_path / "model")
