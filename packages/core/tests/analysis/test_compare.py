"""Runs compared: grouped by configuration without the seed, with Student's intervals and the options that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main


def write_run(folder: Path, algorithm: str, seed: int, reward: float, more: str = "") -> str:
    """Write a run of two steps with its configuration; return its folder."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'seed = {seed}\noutput = "{folder}"\nbatch_size = 4\n{more}\n[algorithm]\nuse = "{algorithm}"\n'
    )
    rows = [{"step": n, "reward/mean": reward * n} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two seeds of each of two algorithms: final rewards 1.0 and 1.2, and 2.0 and 2.2."""
    monkeypatch.chdir(tmp_path)
    return [
        write_run(tmp_path / f"{name}-seed{seed}", name, seed, base + 0.1 * seed, f"save_every = {seed}")
        for name, base in (("grpo", 0.5), ("repulse", 1.0))
        for seed in (0, 1)
    ]


def test_seeds_are_one_group_with_students_interval(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The standard error of two values 0.2 apart is 0.1, and Student's quantile for one degree of freedom 12.7062."""
    assert main(["compare", *runs]) == 0
    text = capsys.readouterr().out
    assert "GRPO, n=2" in text and "RePULSe, n=2" in text
    assert "1.100 ± 1.271" in text and "2.100 ± 1.271" in text
    assert ["algorithm.use", "grpo", "repulse"] in [line.split() for line in text.splitlines()]
    assert "seed" not in text.split("options that differ")[1].split("compare.html")[0], "nor what changes no result"
    page = Path("compare.html").read_text()
    assert page.count("<svg") == 1 and "Differences between" in page and "grpo-seed1" in page


def test_a_group_is_named_by_the_options_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "a", "grpo", 0, 1.0, "minibatches = 1")
    two = write_run(tmp_path / "b", "grpo", 0, 1.0, "minibatches = 2")
    assert main(["compare", one, two, "--output", ""]) == 0
    text = capsys.readouterr().out
    assert "GRPO, minibatches=1, n=1" in text and "GRPO, minibatches=2, n=1" in text
    assert "1.000" not in text and "2.000" in text and "±" not in text.partition("options")[0].splitlines()[1]


def test_different_algorithms_name_the_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Presets differ in many options; a folder's name tells a reader less than the method's."""
    one = write_run(tmp_path / "a", "grpo", 0, 1.0, "minibatches = 1\n[sampling]\nn = 8\ntop_p = 0.9\ntop_k = 5")
    two = write_run(tmp_path / "b", "rloo", 0, 1.0, "minibatches = 2\n[sampling]\nn = 4\ntop_p = 0.8\ntop_k = 6")
    assert main(["compare", one, two, "--output", ""]) == 0
    assert "GRPO, n=1  RLOO, n=1" in capsys.readouterr().out


def test_equal_configurations_are_said_to_be_so(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs[:2], "--output", ""]) == 0
    assert "differ only in seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "'nowhere' contains no run"),
        ([], "compare needs RUNS"),
        (["grpo-seed0", "./grpo-seed0"], "named twice"),
        (["empty"], "no step or evaluation"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "empty", "grpo", 0, 1.0)
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    assert main(["compare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
