"""Ranks that share the layers of a model (`tensor`), outside of runs: norms, precisions, states that sleep, kinds of models."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rlhf_core.strategy.torch import TorchStrategy
from rlhf_core.testing import run_ranks

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import deepspeed_ranks as ranks
import tensor_ranks
from rank_results import assert_continues, assert_resumes, assert_same, outcome

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

ALTERNATING = "alternating-0t-0-2t-2"

OTHERS = ["qwen3:0t", "qwen2:0t", "llama:2ot", "gemma3:1t", "phi:2t"]
"""Kinds of models under every stage."""

CLOSE = 1e-4
"""Norms after three steps of AdamW, whose divisions by small moments make differences of roundings larger."""


def launch(folder: Path, size: int, words: list[str]) -> None:
    """Run the words of `tensor_ranks` on `size` ranks."""
    ranks.write_data(folder)
    done = run_ranks(size, tensor_ranks.main, folder, *words, seconds=900.0)
    assert not any(rank.code for rank in done), "\n".join(rank.stderr[-3000:] for rank in done if rank.code)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two ranks left."""
    folder = tmp_path_factory.mktemp("steps")
    launch(folder, 2, ["steps", ALTERNATING, "wrong"])
    return folder


@pytest.mark.parametrize("stage", tensor_ranks.STATES)
def test_norms_of_steps_that_use_different_heads_are_those_of_torch(stage: str, quick: Path) -> None:
    """Every step is clipped, so that a wrong norm would change the next one, too."""
    found = outcome(quick, "steps")
    assert found[stage]["norms"] == pytest.approx(found["torch"]["norms"], rel=CLOSE)


@pytest.mark.parametrize("stage", tensor_ranks.STATES)
def test_updates_too_small_for_bfloat16_are_not_lost(stage: str, quick: Path) -> None:
    assert outcome(quick, "steps")[stage]["moved"] > 0.6


@pytest.mark.parametrize("stage", tensor_ranks.STATES)
def test_a_gradient_that_is_not_finite_changes_no_weight(stage: str, quick: Path) -> None:
    for dtype, found in outcome(quick, "steps")[stage]["broken"].items():
        assert found == {"same": True, "finite": True, "told": [False, True], "steps": 1}, dtype


@pytest.mark.parametrize("stage", tensor_ranks.STATES)
def test_states_leave_the_device_and_come_back(stage: str, quick: Path) -> None:
    found = outcome(quick, "steps")
    same, norm = found[stage]["slept"]
    assert same and norm == pytest.approx(found["torch"]["slept"][1], rel=1e-5)


@pytest.mark.parametrize("stage", tensor_ranks.STATES)
def test_a_frozen_role_answers_as_one_process_does(stage: str, quick: Path) -> None:
    """After a stay off the device, and with whole weights, which each rank uses on its own."""
    steps = outcome(quick, "steps")
    for found, expected in zip(steps[stage]["answers"], steps["torch"]["answers"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("stage", tensor_ranks.STATES[1:])
def test_float16_skips_a_step_that_overflows(stage: str, quick: Path) -> None:
    steps = outcome(quick, "steps")
    norm, found = steps["torch"]["overflow"]["told"][1]["grad_norm"], steps[stage]["overflow"]
    assert (found["same"], found["changed"], found["steps"]) == (True, True, 1)
    assert not math.isfinite(found["told"][0]["grad_norm"])
    assert [told["loss_scale"] for told in found["told"]] == [65536.0, 32768.0]
    assert found["told"][1]["grad_norm"] == pytest.approx(norm, rel=0.01)


def test_roles_that_share_layers_and_others_live_in_one_process(quick: Path) -> None:
    """DeepSpeed has one global variable for the groups of ranks, which each role needs another value of."""
    norms = outcome(quick, ALTERNATING)
    for stage, found in norms.items():
        assert found == pytest.approx(norms["torch"], rel=1e-5), stage


def test_mistakes_that_only_ranks_can_make_are_one_line_each(quick: Path) -> None:
    told = outcome(quick, "wrong")
    assert told["groups"] == "2 ranks cannot form groups of 4 that share rows; start a multiple of 4 ranks"
    assert "2 must divide the 2 attention heads and the 1 key-value heads; choose another number" in told["heads"]
    assert not any("\n" in line for line in told.values())
    if find_spec("peft") is not None:
        assert "cuts layers, but the model has adapters; train it without lora" in told["lora"]


@pytest.mark.engines
@pytest.mark.skipif(find_spec("rlhf_algos") is None, reason="runs sft of rlhf_algos")
@pytest.mark.parametrize("words", [["qwen3:2t"], pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["qwen3", "others"])
def test_kinds_of_models_change_no_number(words: list[str], tmp_path: Path) -> None:
    """Runs of two ranks, which one process continues."""
    tensor_ranks.write_models(tmp_path)
    launch(tmp_path, 2, words)
    for word in words:
        model, name = word.split(":")[0], word.replace(":", "-")
        expected = tensor_ranks.run(tmp_path, model, TorchStrategy("cpu"), f"{model}-torch")
        found = outcome(tmp_path, word)
        assert_same(found, expected, tolerance=1e-4)
        assert_resumes(found)
        continued = tensor_ranks.resumed(tmp_path, model, TorchStrategy("cpu"), name, f"{name}-torch")
        assert_continues(continued, found)


@pytest.mark.slow
def test_four_ranks_and_two_numbers_of_them_that_share_layers(tmp_path: Path) -> None:
    words = ["alternating-0f-2t-0-2f", "steps"]
    launch(tmp_path, 4, words)
    norms = outcome(tmp_path, words[0])
    for stage, found in norms.items():
        assert found == pytest.approx(norms["torch"], rel=1e-5), stage
    steps = outcome(tmp_path, "steps")
    for stage in tensor_ranks.STATES:
        assert steps[stage]["norms"] == pytest.approx(steps["torch"]["norms"], rel=CLOSE)
