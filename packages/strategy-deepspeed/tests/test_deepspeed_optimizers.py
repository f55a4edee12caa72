"""Any elementwise optimizer works under every stage, on two ranks: the numbers and the checkpoints of one process of torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and this file is not one
from optimizer_ranks import STAGES, actor, follow, train

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that two ranks left."""
    place = tmp_path_factory.mktemp("optimizers")
    done = run_ranks(2, follow, str(place))
    assert [rank.code for rank in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    return place


@pytest.fixture(scope="module")
def straight() -> dict[str, Tensor]:
    """Return the weights after four steps of one process of torch."""
    return train(actor(TorchStrategy("cpu")), 4)


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_deepspeed_does_not_know_takes_the_same_steps(
    stage: int, folder: Path, straight: dict[str, Tensor]
) -> None:
    found = torch.load(folder / "found.pt")[stage]
    assert found.keys() == straight.keys()
    for name, weight in straight.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_of_torch_continues_its_momentum(stage: int, folder: Path, straight: dict[str, Tensor]) -> None:
    role = actor(TorchStrategy("cpu"))
    role.load(str(folder / str(stage)))
    for name, weight in train(role, 2).items():
        torch.testing.assert_close(weight, straight[name], rtol=1e-4, atol=1e-5)
