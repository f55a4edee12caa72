"""A batch with fewer prompts than ranks: a rank without one takes part in every step, and no number depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fewer_prompts_ranks import QUICK, SLOW, run_all, write_pairs

from rlhf_core.testing import run_ranks

OWN = ("time/", "memory/", "speed/")
"""Metrics of a process, not of the run."""


def run_both(folder: Path, cases: dict[str, dict[str, Any]]) -> Path:
    """Make runs in one process and on three ranks."""
    pytest.importorskip("rlhf_algos", reason="trains its algorithms")
    pairs = write_pairs(folder)
    run_all(cases, pairs, str(folder / "one"))
    done = run_ranks(3, run_all, cases, pairs, str(folder / "three"))
    assert [rank.code for rank in done] == [0, 0, 0], "".join(rank.stderr[-2000:] for rank in done)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_both(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_both(tmp_path_factory.mktemp("slow"), SLOW)


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]
    return [{name: each for name, each in row.items() if not name.startswith(OWN)} for row in found]


def assert_equal_runs(case: str, runs: Path) -> None:
    """Compare the weights and every metric of a run on three ranks with those of one process."""
    one, three = (torch.load(runs / f"{name}-{case}.pt", weights_only=False) for name in ("one", "three"))
    assert any(0 in ranks for ranks in three["seen"]), "a rank had no row"
    assert [sum(ranks) for ranks in three["seen"]] == [sum(ranks) for ranks in one["seen"]]
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(three["weights"][name], tensor, rtol=0.0, atol=1e-5)
    for file in ("metrics.jsonl", "evaluation-metrics.jsonl"):
        if not (runs / f"one-{case}" / file).exists():
            continue
        ours, theirs = (rows(runs / f"{name}-{case}", file) for name in ("three", "one"))
        assert len(ours) == len(theirs) > 0
        for found, expected in zip(ours, theirs, strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    samples = [{row["step"] for row in rows(runs / f"{name}-{case}", "samples.jsonl")} for name in ("three", "one")]
    assert samples[0] == samples[1] and samples[0], "the rank that writes samples had some"


@pytest.mark.parametrize("case", QUICK)
def test_three_ranks_have_the_numbers_of_one_process(case: str, quick: Path) -> None:
    assert_equal_runs(case, quick)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_three_ranks_have_the_numbers_of_one_process_under_any_algorithm(case: str, slow: Path) -> None:
    assert_equal_runs(case, slow)


def test_an_evaluation_measures_every_prompt_once(quick: Path) -> None:
    """Two prompts are held out, and one of three ranks has none: the values of one process, of which none is missing."""
    metrics = rows(quick / "three-heldout", "evaluation-metrics.jsonl")[-1]
    names = ("heldout/reward", "heldout/first", "pass@1", "policy/kl", "preference/accuracy", "win_rate")
    assert all(f"eval/{name}" in metrics for name in names)
