"""DeepSpeed alone with core: runs on ranks beside plain torch in one process, single steps, checkpoints, and mistakes.

`test_deepspeed_ranks` has the algorithms of rlhf-algos, which another session runs. No test is in both.
"""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_core.strategy.torch import TorchStrategy

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and these files are none
import deepspeed_ranks as ranks
from rank_results import (
    assert_continues,
    assert_resumes,
    assert_same,
    assert_transformers_loads,
    launch,
    outcome,
    reference,
)

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

WORDS = {1: ["plain:3", "steps"], 2: ["plain:0", "steps", "wrong"]}
"""Runs and checks by number of ranks."""

RUNS = [(1, "plain:3"), (2, "plain:0")]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders that all runs of a number of ranks left."""
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in WORDS}
    for size, folder in folders.items():
        launch(folder, size, WORDS[size])
    return folders


@pytest.mark.parametrize(("size", "word"), RUNS)
def test_stages_and_ranks_change_no_number(size: int, word: str, quick: dict[int, Path]) -> None:
    assert_same(outcome(quick[size], word), reference("plain"), tolerance=1e-4)


@pytest.mark.parametrize(("size", "word"), RUNS)
def test_a_resumed_run_goes_on_to_the_very_same_weights(size: int, word: str, quick: dict[int, Path]) -> None:
    assert_resumes(outcome(quick[size], word))


def test_one_process_of_torch_continues_what_ranks_wrote(quick: dict[int, Path]) -> None:
    found = ranks.resumed(quick[2], "plain", TorchStrategy("cpu"), "plain-0", "plain-0-torch")
    assert_continues(found, outcome(quick[2], "plain:0"))


def test_another_stage_on_one_rank_continues_what_ranks_wrote(quick: dict[int, Path]) -> None:
    launch(quick[2], 1, ["plain:plain-0:1"])
    assert_continues(outcome(quick[2], "plain:plain-0:1"), outcome(quick[2], "plain:0"))


def test_ranks_continue_what_one_process_of_torch_wrote(tmp_path: Path) -> None:
    ranks.write_data(tmp_path)
    whole = ranks.run(tmp_path, "plain", TorchStrategy("cpu"), "plain-torch")
    words = [f"plain:plain-torch:{stage}" for stage in range(4)]
    launch(tmp_path, 2, words)
    for word in words:
        assert_continues(outcome(tmp_path, word), whole)


@pytest.mark.parametrize(("size", "word"), RUNS)
def test_transformers_loads_what_was_trained(size: int, word: str, quick: dict[int, Path]) -> None:
    assert_transformers_loads(quick[size], word)


def test_a_head_beside_the_model_is_exported_whole(quick: dict[int, Path]) -> None:
    shapes = {
        name: load_file(quick[size] / name / "model" / "heads.safetensors")["value.weight"].shape
        for size, name in ((1, "plain-3"), (2, "plain-0"))
    }
    assert set(shapes.values()) == {(1, 64)}


@pytest.mark.parametrize("size", WORDS)
def test_a_weight_that_a_step_leaves_out_has_no_gradient_in_it(size: int, quick: dict[int, Path]) -> None:
    steps = outcome(quick[size], "steps")
    for stage in ranks.EVERY:
        assert steps[stage]["norms"] == pytest.approx(steps["torch"]["norms"], rel=1e-5)


@pytest.mark.parametrize("size", WORDS)
def test_updates_too_small_for_bfloat16_are_not_lost(size: int, quick: dict[int, Path]) -> None:
    """Five steps of a fifth of a spacing each move a weight by a spacing, if its float32 copy keeps them."""
    steps = outcome(quick[size], "steps")
    assert all(steps[stage]["moved"] > 0.6 for stage in ("torch", *ranks.STATES))


@pytest.mark.parametrize("size", WORDS)
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_schedule_and_is_told(
    size: int, quick: dict[int, Path]
) -> None:
    steps = outcome(quick[size], "steps")
    for stage in ("torch", *ranks.STATES):
        for dtype, found in steps[stage]["broken"].items():
            assert found == {"same": True, "finite": True, "told": [False, True], "steps": 1}, (stage, dtype)


@pytest.mark.parametrize("size", WORDS)
def test_frozen_weights_leave_the_device_and_come_back_too(size: int, quick: dict[int, Path]) -> None:
    steps = outcome(quick[size], "steps")
    for stage in ranks.STATES:
        same, norm = steps[stage]["slept"]
        assert same and norm == pytest.approx(steps["torch"]["slept"][1], rel=1e-5)


@pytest.mark.parametrize("size", WORDS)
def test_float16_skips_a_step_that_overflows_and_halves_the_scale(size: int, quick: dict[int, Path]) -> None:
    steps = outcome(quick[size], "steps")
    norm = steps["torch"]["overflow"]["told"][1]["grad_norm"]
    for stage in ("torch", *ranks.STATES[1:]):
        found = steps[stage]["overflow"]
        assert (found["same"], found["changed"], found["steps"]) == (True, True, 1), stage
        assert not math.isfinite(found["told"][0]["grad_norm"]), stage
        assert [told["loss_scale"] for told in found["told"]] == [65536.0, 32768.0], stage
        assert found["told"][1]["grad_norm"] == pytest.approx(norm, rel=0.01), stage


def test_mistakes_that_only_ranks_can_make_are_one_line_each(quick: dict[int, Path]) -> None:
    told = outcome(quick[2], "wrong")
    assert "cannot train in float16 at stage 0" in told["dtype"]
    assert told["hpz"] == "DeepSpeed(hpz=…) 3 does not divide the 2 ranks; choose a number that does"
    assert "the model has no module of class 'Experts'; name one of" in told["leaves"]
    assert told["groups"] == "2 ranks cannot form groups of 3 that share rows; start a multiple of 3 ranks"
    assert told["heads"].endswith(
        "2 must divide the 1 attention heads, and must divide the 1 key heads or be a multiple of them; "
        'choose another number, or DeepSpeed(sequence_kind="ring")'
    )
    assert "cuts packed rows, which this model's attention 'sdpa' does not take" in told["padded"]
