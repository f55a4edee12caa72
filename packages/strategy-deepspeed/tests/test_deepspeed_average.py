"""Moving averages of weights under every stage, on two ranks: the float64 average of the gathered weights at each step."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and this file is not one
from average_ranks import STAGES, actor, averages, follow

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that two ranks left."""
    place = tmp_path_factory.mktemp("average")
    done = run_ranks(2, follow, str(place))
    assert [rank.code for rank in done] == [0, 0], done[0].stderr[-3000:] + done[1].stderr[-3000:]
    return place


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Any]:
    """Return the averages, by stage and precision."""
    result: dict[Any, Any] = torch.load(folder / "found.pt", weights_only=False)
    return result


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_the_average_is_the_float64_average_of_the_gathered_weights(
    stage: int, dtype: str, found: dict[Any, Any]
) -> None:
    seen = found[stage, dtype]
    assert seen["expected"].keys() == seen["found"].keys()
    for name, expected in seen["expected"].items():
        torch.testing.assert_close(seen["found"][name].double(), expected, rtol=1e-6, atol=1e-7)


def test_a_rank_holds_its_share_of_the_average_alone(found: dict[Any, Any]) -> None:
    whole = found[0, "float32"]["held"]
    parameters = len(found[0, "float32"]["found"])
    assert found[3, "float32"]["held"] <= whole / 2 + parameters, "a share is rounded up by at most one element"


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_a_checkpoint_restores_the_average(stage: int, dtype: str, found: dict[Any, Any]) -> None:
    seen = found[stage, dtype]
    for name, kept in seen["found"].items():
        assert torch.equal(seen["loaded"][name], kept), name


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_one_process_of_torch_continues_the_average(stage: int, folder: Path, found: dict[Any, Any]) -> None:
    role = actor(TorchStrategy("cpu"), "float32")
    role.load(str(folder / f"{stage}-float32"))
    for name, average in averages(role).items():
        assert torch.equal(average, found[stage, "float32"]["found"][name]), name


@pytest.mark.parametrize(("stage", "dtype"), STAGES)
def test_the_average_is_exported_for_transformers(stage: int, dtype: str, folder: Path, found: dict[Any, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / f"{stage}-{dtype}" / "model-ema", dtype=torch.float32)
    seen = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    for name, average in found[stage, dtype]["found"].items():
        held = average if dtype == "float32" or stage == 0 else average.bfloat16().float()
        assert torch.equal(seen[name], held), name
