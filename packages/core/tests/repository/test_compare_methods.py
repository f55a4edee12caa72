"""`benchmarks/compare.py` records what its runs measured, and its table has means and standard errors over seeds."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rlhf_algos")

BENCHMARKS = Path(__file__).resolve().parents[4] / "benchmarks"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare")


def record(method: str, seed: int, rewards: list[float], heldout: float, finished: bool = True) -> dict[str, Any]:
    return {
        "run": f"{method}-seed{seed}",
        "method": method,
        "seed": seed,
        "finished": finished,
        "steps": {"reward": rewards, "kl": [0.0, 1.0, 2.0], "seconds": [0.5, 0.5, 0.5]},
        "start": {"reward": 0.25, "kl": 0.0, "tokens": 30.0},
        "heldout": {"reward": heldout, "kl": 2.5, "tokens": 31.0},
    }


def test_the_table_has_means_and_standard_errors_over_seeds(compare: Any) -> None:
    records = [record("grpo", seed, [0.1, 0.2, 0.3 + seed], 0.5 + seed) for seed in range(3)]
    records.append(record("rloo", 0, [9.0], 9.0, finished=False))
    lines = compare.table(records, {"device": "CPU", "finished": 3, "planned": 4, "jobs": 1}).splitlines()
    # rewards 0.2, 0.5333, 0.8667 and 0.5, 1.5, 2.5: deviations 1/3 and 1, errors a root of 3 smaller
    assert lines[2] == "| before training | | | | | 0.250 ± 0.000 | 0 | 30.0 ± 0.0 | |"
    assert lines[3] == (
        "| GRPO | 3 | 0.533 ± 0.192 | 0.533 ± 0.192 | 1.0 ± 0.0 | 1.500 ± 0.577 | 2.50 ± 0.00 | 31.0 ± 0.0 | 0.50 |"
    )
    assert not any("RLOO" in line for line in lines)  # it is not finished
    assert compare.smooth([1.0, 2.0, 3.0, 7.0]) == [1.0, 1.5, 2.0, 4.0]


def test_the_table_goes_between_the_marks_of_a_page(compare: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n")
    facts = {"device": "CPU", "finished": 1, "planned": 1, "jobs": 1}
    compare.write_files([record("ppo", 0, [0.5, 0.5, 0.5], 0.75)], facts, tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| PPO | 1 | 0.500 |" in text
    assert "old" not in text
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        compare.write_files([], facts, tmp_path, page)


def test_a_run_is_recorded_with_its_curves_and_both_evaluations(compare: Any, tmp_path: Path) -> None:
    chosen = argparse.Namespace(rehearse=True, model="tiny", steps=2, seeds=1, keep=None)
    planned = compare.plan(chosen)
    assert [each.name for each in planned] == [f"{method}-seed0" for method in compare.METHODS]
    less = {"use": "heldout,policy_stats", "heldout": {"n": 1, "prompts": 2}, "policy_stats": {"n": 1, "prompts": 2}}
    small = replace(planned[1], settings={**planned[1].settings, "batch_size": 1, "evaluator": less})
    pages: list[Any] = []
    write = lambda records, facts: pages.append(records)
    assert compare.TimedRuns(tmp_path, [small], 1, 5, compare.read, write).run(), pages[-1]
    (made,) = pages[-1]
    assert {name: len(values) for name, values in made["steps"].items()} == {"reward": 2, "kl": 2, "seconds": 2}
    assert set(made["start"]) == set(made["heldout"]) == {"reward", "kl", "tokens"}
    assert made["start"]["kl"] == pytest.approx(0, abs=1e-6)
