"""RePULSe under DeepSpeed on two ranks: two trained models and three terms, with the numbers of torch in one process.

Its cases of all stages with every option are among the slow ones of `test_deepspeed_ranks`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import deepspeed_ranks as ranks
from rank_results import assert_same

pytest.importorskip("rlhf_algos", reason="trains RePULSe of rlhf-algos")
pytestmark = [pytest.mark.engines, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]

SHORT = {"steps": 3, "save_every": 0}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Return the results of two ranks, by stage, and those of torch in this process."""
    folder = tmp_path_factory.mktemp("repulse")
    done = run_ranks(2, ranks.every_stage, str(folder), "repulse", SHORT)
    assert [rank.code for rank in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    results: dict[Any, Any] = torch.load(folder / "found.pt", weights_only=False)
    results["torch"] = ranks.run(folder, "repulse", TorchStrategy("cpu"), "torch", **SHORT)
    return results


@pytest.mark.parametrize("stage", range(4))
def test_repulse_has_the_numbers_of_one_process(stage: int, found: dict[Any, Any]) -> None:
    assert found["torch"]["weights"].keys() == {"actor", "proposal"}
    assert_same(found[stage], found["torch"], tolerance=1e-4)


def test_both_models_move(found: dict[Any, Any]) -> None:
    weights = found["torch"]["weights"]
    assert all(not torch.equal(weights["actor"][name], tensor) for name, tensor in weights["proposal"].items())
