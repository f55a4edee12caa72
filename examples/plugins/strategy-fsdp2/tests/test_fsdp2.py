"""FSDP2 on two ranks gives what `torch` gives: metrics, exported models, adapters, averages; and it resumes to the bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core import RunConfig, TrainedOptions, UsageError, make_config
from rlhf_core.testing import check_light, check_strategy
from rlhf_strategy_fsdp2.strategy import FSDP2

RANKS = Path(__file__).with_name("fsdp2_ranks.py")
sys.path.append(str(RANKS.parent))
import fsdp2_ranks  # noqa: E402  the module that the ranks run

MEASURED = ("time", "speed", "memory")
"""First parts of metrics that depend on the machine."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, by two ranks that are started once."""
    folder = tmp_path_factory.mktemp("fsdp2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    fsdp2_ranks.write_data(folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, RANKS, folder], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of a run, except those of machine and clock."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if name.split("/")[0] not in MEASURED} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported folder."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference between two models."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def test_it_keeps_the_contract_of_a_strategy_in_one_process_and_on_two_ranks() -> None:
    check_light("rlhf_strategy_fsdp2.plugin", "rlhf_strategy_fsdp2.strategy")
    check_strategy(FSDP2(), ranks=2)


@pytest.mark.parametrize(
    "case", ["grpo", "ppo", "reward", "omd", "memoryless", "dpo", "distill", "lora", "tracking", "episodes"]
)
def test_metrics_on_two_ranks_equal_those_of_torch(case: str, runs: Path) -> None:
    found, expected = metrics(runs / f"{case}-fsdp2"), metrics(runs / f"{case}-torch")
    assert len(expected) == 3
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # ranks add float32 gradients in another order
    assert expected[0] != pytest.approx(expected[-1], rel=1e-6, abs=1e-6), "training changed what is compared"


@pytest.mark.parametrize("case", ["grpo", "ppo", "reward", "omd", "memoryless", "dpo", "distill"])
def test_exported_models_equal_those_of_torch(case: str, runs: Path) -> None:
    assert furthest(weights(runs / f"{case}-fsdp2" / "model"), weights(runs / f"{case}-torch" / "model")) < 1e-5


def test_an_exported_adapter_is_trained_and_equals_that_of_torch(runs: Path) -> None:
    found, expected = weights(runs / "lora-fsdp2" / "model"), weights(runs / "lora-torch" / "model")
    assert furthest(found, expected) < 1e-5
    assert max(float(found[name].abs().max()) for name in found if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("case", ["grpo", "lora"])
def test_an_exported_average_differs_from_the_weights_and_equals_that_of_torch(case: str, runs: Path) -> None:
    model, average = (weights(runs / f"{case}-fsdp2" / name) for name in ("model", "model-ema"))
    assert furthest(average, model) > 1e-4
    assert furthest(average, weights(runs / f"{case}-torch" / "model-ema")) < 1e-5


@pytest.mark.parametrize("case", ["grpo", "lora", "omd"])
def test_a_resumed_run_equals_a_straight_one_to_the_bit(case: str, runs: Path) -> None:
    straight, resumed = runs / f"{case}-straight", runs / f"{case}-resumed"
    assert metrics(resumed) == metrics(straight)
    assert len(metrics(resumed)) == 4
    for name in ("model",) if case == "omd" else ("model", "model-ema"):
        assert furthest(weights(resumed / name), weights(straight / name)) == 0.0


def test_a_checkpoint_of_two_ranks_resumes_on_one(runs: Path) -> None:
    shutil.copytree(runs / "grpo-straight", runs / "grpo-alone")
    shutil.rmtree(runs / "grpo-alone" / "checkpoints" / "step-4")
    fsdp2_ranks.run(runs, "grpo", "fsdp2", "grpo-alone", steps=4, save_every=2, resume=True)
    for row, wanted in zip(metrics(runs / "grpo-alone"), metrics(runs / "grpo-straight"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_bfloat16_follows_torch_within_its_rounding(runs: Path) -> None:
    """`torch` computes some operations in float32 under autocast; FSDP2 gathers bfloat16 weights."""
    found, expected = metrics(runs / "bf16-fsdp2")[0], metrics(runs / "bf16-torch")[0]
    assert found["grad_norm/actor"] == pytest.approx(expected["grad_norm/actor"], rel=0.05)
    master = weights(runs / "bf16-fsdp2" / "model")
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in master.values()), "float32 masters"


def test_float16_is_refused_in_one_line(tmp_path: Path) -> None:
    from rlhf_core import Run

    actor = TrainedOptions(model="tiny", dtype="float16")
    config: RunConfig = make_config(
        "grpo", model="tiny", actor=actor, reward="length", strategy=FSDP2(), output=str(tmp_path), steps=1
    )
    with pytest.raises(UsageError, match="does not train in float16: use bfloat16 or float32"):
        Run(config).train()


def test_an_estimator_that_keeps_all_pairs_is_refused_in_one_line(tmp_path: Path) -> None:
    fsdp2_ranks.write_data(tmp_path)
    head = {"freeze": ["body"], "optim": {"use": "mle"}}
    with pytest.raises(UsageError, match="keeps all pairs, .* sharded checkpoint .*; use strategy") as error:
        fsdp2_ranks.run(tmp_path, "omd", "fsdp2", "mle", reward=head)
    assert "\n" not in str(error.value)
