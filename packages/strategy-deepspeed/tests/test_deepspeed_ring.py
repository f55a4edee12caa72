"""Runs on ranks that share rows by ring attention, beside plain torch in one process: the same numbers, step by step."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
from rank_results import assert_resumes, assert_same, launch, outcome, reference

pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")
pytestmark = [pytest.mark.engines, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]

PAIR = ["sft:2r", "odd:3r"]
"""Of 2 ranks; `odd` is grpo with gradient checkpointing and 3 heads, which neither 2 nor 4 ranks divide."""

FOUR = ["sft:1w", "odd:2w", "odd:3r", "ppo:0r"]
"""Four ranks per row, and two pairs of ranks with rows of their own."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the runs of two ranks left."""
    folder = tmp_path_factory.mktemp("ring")
    launch(folder, 2, PAIR)
    return folder


@pytest.mark.parametrize("word", PAIR)
def test_two_ranks_that_share_rows_change_no_number(word: str, pair: Path) -> None:
    assert_same(outcome(pair, word), reference(word.split(":")[0]), tolerance=1e-4)


@pytest.mark.parametrize("word", PAIR)
def test_a_resumed_run_goes_on_to_the_very_same_weights(word: str, pair: Path) -> None:
    assert_resumes(outcome(pair, word))


@pytest.mark.slow
def test_four_ranks_that_share_rows_change_no_number(tmp_path: Path) -> None:
    launch(tmp_path, 4, FOUR)
    for word in FOUR:
        assert_same(outcome(tmp_path, word), reference(word.split(":")[0]), tolerance=1e-4)
