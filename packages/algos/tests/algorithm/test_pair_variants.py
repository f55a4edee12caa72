"""Objectives on pairs through the command line: how a batch is cut into micro-batches changes no number of any of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_core.cli import main

VARIANTS = (
    ["dpo", "--loss", "apo_down"],
    ["dpo", "--loss", "apo_zero"],
    ["dpo", "--loss", "discopop"],
    ["dpo", "--loss", "exo_pair"],
    ["dpo", "--loss", "hinge"],
    ["dpo", "--loss", "nca_pair"],
    ["dpo", "--loss", "robust"],
    ["dpo", "--loss", "sigmoid_norm"],
    ["dpo", "--loss", "sppo_hard"],
    ["aot"],
    ["aot", "--loss.paired", "False"],
    ["bco_pair"],
    ["cdpo"],
    ["ipo"],
    ["orpo"],
    ["simpo"],
)
CUT = ["--micro-tokens", "1", "--actor.packing", "False", "--chunk", "7"]
"""One pair at a time, padded, with the logits of seven tokens at a time."""


def metrics(folder: Path, data: Path, words: list[str]) -> list[dict[str, float]]:
    """Return the loss metrics of three steps, except times and sizes."""
    words = [*words, "--model", "tiny:hidden=16,layers=1", "--data.path", str(data), "--output", str(folder)]
    words += ["--steps", "3", "--batch-size", "6", "--actor.optim.lr", "1e-2"]
    assert main(words) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss/", "actor/", "grad_norm/", "bco/")
    return [{name: value for name, value in line.items() if name.startswith(kept)} for line in lines]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"p{n}", "chosen": "ab" * (1 + n % 5), "rejected": "c" * (1 + n % 7)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_how_a_batch_of_pairs_is_cut_changes_no_number(words: list[str], pairs: Path, tmp_path: Path) -> None:
    whole, cut = metrics(tmp_path / "whole", pairs, words), metrics(tmp_path / "cut", pairs, [*words, *CUT])
    assert len(whole) == len(cut) == 3
    for one, other in zip(whole, cut, strict=True):
        assert one.keys() == other.keys() >= {"loss/actor", "actor/margin"}
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=2e-4, abs=2e-5), name
    assert whole[2]["actor/margin"] > whole[0]["actor/margin"], "it learns what is preferred"
