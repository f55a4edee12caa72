"""Every run, sweep and recipe leaves a report and names it; a report that fails is one line, and the work stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.analysis.report import writing
from rlhf_core.cli import main

RUN = [
    "--model",
    "tiny",
    "--reward",
    "length",
    "--batch-size",
    "1",
    "--sampling.n",
    "2",
    "--sampling.max-new-tokens",
    "4",
]


def run(folder: Path, *flags: str) -> int:
    return main(["rloo", *RUN, "--steps", "2", "--output", str(folder), *flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("rlhf_algos")
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder) == 0
    return folder


def test_a_run_ends_with_a_report_of_its_plan_and_versions(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<h2>Plan</h2>" in page and "on actor" in page and "<td>torch</td>" in page
    assert "report.html" in json.loads((finished / "run.json").read_text())["names"]


def test_its_last_line_names_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rlhf_algos")
    assert run(tmp_path / "run") == 0
    *_, model, report = capsys.readouterr().err.strip().splitlines()
    assert model.endswith("run/model") and report == f"report in {tmp_path / 'run' / 'report.html'}"


def test_no_report_is_written_where_none_is_wanted(tmp_path: Path) -> None:
    pytest.importorskip("rlhf_algos")
    assert run(tmp_path / "run", "--report", "False") == 0
    assert not {"report.html", "about.json"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_of_no_steps_has_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rlhf_algos")
    assert run(tmp_path / "run", "--steps", "0") == 0
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("model saved in")
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_that_fails_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rlhf_algos")

    def broken(*_: object) -> str:
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(writing, "page", broken)
    assert run(tmp_path / "run") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "could not be written" in line]
    assert len(warnings) == 1 and "ZeroDivisionError: no page" in warnings[0]
    assert (tmp_path / "run" / "model").is_dir()


def test_a_sweep_ends_with_a_report(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "rloo-seed0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    (folder / "sweep-status.json").write_text('{"exit": 0, "seconds": 1.0}')
    file = tmp_path / "s.toml"
    file.write_text(f'output = "{tmp_path / "out"}"\n[variants.rloo]\n')
    assert main(["sweep", str(file), "--report", "False"]) == 0 and not (tmp_path / "out" / "report.html").exists()
    assert main(["sweep", str(file)]) == 0
    assert f"report in {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().err
    assert "RLOO" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_of_a_hundred_thousand_steps_is_small(tmp_path: Path) -> None:
    """A part of the lines is read, and times are scaled to the whole: 100,000 steps of a second each."""
    names = [f"{name}/actor" for name in ("loss", "grad_norm", "lr")] + [f"other/{k}" for k in range(30)]
    lines = (
        json.dumps({"step": n, "reward/mean": n % 7, "time/step": 1.0, **dict.fromkeys(names, n % 5)})
        for n in range(1, 100_001)
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = writing.write_report(tmp_path).read_bytes()
    assert len(page) < 500 * 1024
    assert b"<td>100000.0 s</td>" in page
