"""Runs of rlhf-algos under plain torch in one process and under DeepSpeed on two ranks: the same numbers, step by step."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
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

pytest.importorskip("rlhf_algos", reason="runs algorithms of rlhf-algos")
pytestmark = [pytest.mark.engines, pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")]

QUICK = ["sft:1o", "dpo:2", "ppo:3s", "grpo3:2o", "distill:3a", "sft1:3"]
"""Every stage that shards occurs; `test_deepspeed_plain` has stage 0 and the other options."""

BF16_TOLERANCE = 0.02
"""Eight bits of weights that were multiplied in another order, over 20 steps that make the loss half as large."""

CROSS = {
    1: ["0", "1", "2", "3", "2c"],
    2: ["0", "1", "1o", "2", "2o", "2c", "3", "3o", "3a", "3c", "3h", "0s", "1s", "2s", "3s", "2r"],
}
"""Stages by number of ranks, under each of which every case runs."""

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs peft")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all quick runs left."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, 2, QUICK)
    return folder


@pytest.mark.parametrize("word", QUICK)
def test_stages_and_ranks_change_no_number(word: str, quick: Path) -> None:
    assert_same(outcome(quick, word), reference(word.split(":")[0]), tolerance=1e-4)


@pytest.mark.parametrize("word", QUICK)
def test_a_resumed_run_goes_on_to_the_very_same_weights(word: str, quick: Path) -> None:
    assert_resumes(outcome(quick, word))


@pytest.mark.parametrize("word", QUICK)
def test_one_process_of_torch_continues_what_ranks_wrote(word: str, quick: Path) -> None:
    case, name = word.split(":")[0], word.replace(":", "-")
    found = ranks.resumed(quick, case, TorchStrategy("cpu"), name, f"{name}-torch")
    assert_continues(found, outcome(quick, word))


def test_other_stages_and_numbers_of_ranks_continue_what_ranks_wrote(quick: Path) -> None:
    """One rank, under the next stage."""
    pairs = [word.split(":") for word in QUICK]
    words = {f"{case}:{case}-{stage}:{(int(stage[0]) + 1) % 4}": f"{case}:{stage}" for case, stage in pairs}
    launch(quick, 1, list(words))
    for word, old in words.items():
        assert_continues(outcome(quick, word), outcome(quick, old))


@pytest.mark.parametrize("word", QUICK)
def test_transformers_loads_what_was_trained(word: str, quick: Path) -> None:
    assert_transformers_loads(quick, word)


# ----------------------------------------------------------------------------------------------------------------------
# everything, in minutes
# ----------------------------------------------------------------------------------------------------------------------


@needs_peft
def test_adapters_change_no_number_either(tmp_path: Path) -> None:
    """LoRA on two ranks, with the optimizer's state sharded and with the weights sharded."""
    words = ["lora:2", "lora:3"]
    launch(tmp_path, 2, words)
    for word in words:
        assert_same(outcome(tmp_path, word), reference("lora"), tolerance=1e-4)
        assert_resumes(outcome(tmp_path, word))


@pytest.mark.slow
def test_four_ranks_that_share_rows_change_no_number(tmp_path: Path) -> None:
    """Four ranks per row, and two pairs of ranks with rows of their own."""
    words = ["wide:2q", "wide:0s", "wide:3s"]
    launch(tmp_path, 4, words)
    for word in words:
        assert_same(outcome(tmp_path, word), reference("wide"), tolerance=1e-4)


def fits(case: str, stage: str) -> bool:
    """Return False where ranks share rows in a way that is refused: a loss of whole distributions, or heads to deal."""
    return not (case == "distill" and stage[-1] in "sr") and not (case == "odd" and stage[-1] == "s")


@pytest.fixture(scope="module", params=[1, 2])
def cross(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All cases under all stages."""
    folder = tmp_path_factory.mktemp(f"cross{request.param}")
    cases = set(ranks.CASES) - (set() if find_spec("peft") else {"lora"})
    words = [f"{case}:{stage}" for case in sorted(cases) for stage in CROSS[request.param] if fits(case, stage)]
    launch(folder, request.param, words, seconds=7200.0)
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(ranks.CASES))
@pytest.mark.parametrize("stage", sorted(set().union(*CROSS.values())))
def test_every_algorithm_under_every_stage(case: str, stage: str, cross: tuple[int, Path]) -> None:
    if case == "lora" and find_spec("peft") is None:
        pytest.skip("needs peft")
    if stage not in CROSS[cross[0]] or not fits(case, stage):
        pytest.skip("runs on another number of ranks, or is refused")
    found = outcome(cross[1], f"{case}:{stage}")
    assert_same(found, reference(case), tolerance=BF16_TOLERANCE if case == "bf16" else 1e-4)
    assert_resumes(found)
    if case == "lora":  # what is exported are the adapters, which rlhf-core tests
        return
    exported = load_file(cross[1] / f"{case}-{stage}" / "model" / "model.safetensors")
    assert all(torch.equal(exported[name].float(), found["weights"]["actor"][name]) for name in exported)
