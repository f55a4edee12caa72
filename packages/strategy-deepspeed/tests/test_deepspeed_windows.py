"""Sliding windows and chunks of attention on ranks that share rows: the numbers of one process, or one line."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import window_ranks
from rank_results import assert_same

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with what two ranks left."""
    folder = tmp_path_factory.mktemp("windows")
    window_ranks.write_models(folder)
    done = run_ranks(2, window_ranks.main, str(folder), seconds=600.0)
    assert not any(rank.code for rank in done), "\n".join(rank.stderr[-3000:] for rank in done if rank.code)
    return folder


@pytest.mark.parametrize("model", window_ranks.WINDOWS)
def test_windows_reach_over_the_stretches_of_ranks(model: str, two: Path) -> None:
    found = torch.load(two / f"{model}.pt", weights_only=False)
    assert_same(found, window_ranks.run(str(two), model, TorchStrategy("cpu"), f"{model}-alone"), tolerance=1e-4)


def test_chunks_are_refused_in_one_line(two: Path) -> None:
    for rank in (0, 1):
        message = (two / f"message-{rank}").read_text("utf-8")
        assert message.endswith(
            "2 cuts packed rows, but this model has chunked_attention layers, which need whole rows; leave it out"
        )
        assert "\n" not in message
