"""Fewer prompts than ranks under DeepSpeed: a rank without one takes part in all that is collective, and changes no number."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import few_ranks
from rank_results import Result, assert_same

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The numbers of plain torch in one process."""
    return few_ranks.run_few(str(tmp_path_factory.mktemp("alone")), TorchStrategy("cpu"), "torch")


def assert_equal_ranks(size: int, stages: list[str], folder: Path, alone: Result) -> None:
    done = run_ranks(size, few_ranks.main, str(folder), *stages, seconds=600.0)
    assert not any(rank.code for rank in done), "\n".join(rank.stderr[-3000:] for rank in done if rank.code)
    for stage in stages:
        found = torch.load(folder / f"{stage}.pt", weights_only=False)
        assert [len(rows) for rows in found["sampled"]] == [len(rows) for rows in alone["sampled"]]
        assert_same(found, alone, tolerance=1e-4)


def test_two_ranks_train_on_one_prompt(tmp_path: Path, alone: Result) -> None:
    assert_equal_ranks(2, ["0", "3"], tmp_path, alone)


@pytest.mark.slow
def test_every_stage_trains_on_one_prompt(tmp_path: Path, alone: Result) -> None:
    assert_equal_ranks(3, ["1", "2", "3a"], tmp_path, alone)


@pytest.mark.slow
def test_groups_that_share_rows_or_layers_train_on_one_prompt(tmp_path: Path, alone: Result) -> None:
    """Four ranks in groups of two: one group has the prompt."""
    assert_equal_ranks(4, ["3s", "1r", "1t"], tmp_path, alone)
