"""Runs under plain torch in one process and under DeepSpeed on ranks: the same numbers, step by step.

The reference is core's own loop and strategy in this process, in float32. The ranks are real processes on gloo.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core.strategy.torch import TorchStrategy

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path, and this file is not one
import deepspeed_ranks as ranks

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

Result = dict[str, Any]

QUICK = {
    1: ["plain:3", "steps"],
    2: ["plain:0", "sft:1o", "dpo:2", "ppo:3s", "grpo3:2o", "distill:3a", "sft1:3", "steps", "wrong"],
}
"""By number of ranks; every case and every stage occurs, those of rlhf-algos if it is installed."""

CHECKS = ("steps", "wrong")
"""Words that are no runs."""

CROSS = {
    1: ["0", "1", "2", "3", "2c"],
    2: ["0", "1", "1o", "2", "2o", "2c", "3", "3o", "3a", "3c", "3h", "0s", "1s", "2s", "3s"],
}
"""Stages by number of ranks, under each of which every case runs."""

BF16_TOLERANCE = 0.02
"""Eight bits of weights that were multiplied in another order, over 20 steps that make the loss half as large."""

APART = ("time/", "speed/", "memory/", "padding", "actor/accuracy")
"""Metrics that may differ: seconds and bytes; which rows share a micro-batch; and, in the first step of dpo, how many margins
are above zero, since policy and reference are the same model and every margin is rounding."""


def runnable(words: list[str]) -> list[str]:
    """Those whose algorithm, and what it needs, is installed."""
    lacking = find_spec("rlhf_algos") is None
    cases = (
        {"plain", *CHECKS} if lacking else {*ranks.CASES, *CHECKS} - ({"lora"} if find_spec("peft") is None else set())
    )
    return [word for word in words if word.split(":")[0] in cases]


def launch(folder: Path, size: int, words: list[str]) -> None:
    """Run `deepspeed_ranks.py` on `size` ranks."""
    ranks.write_data(folder)
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    done = subprocess.run(
        [*command, ranks.__file__, str(folder), *words], capture_output=True, text=True, env={**os.environ, **quiet}
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank") and "Connection closed" not in line]
    assert done.returncode == 0, "\n".join(said[-60:]) or done.stderr[-4000:]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """Return the numbers of a case under plain torch in this process."""
    known: dict[str, Result] = {}

    def find(case: str) -> Result:
        if case not in known:
            folder = tmp_path_factory.mktemp("torch")
            ranks.write_data(folder)
            known[case] = ranks.run(folder, case, TorchStrategy("cpu"), case)
        return known[case]

    return find


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folders that all quick runs of a number of ranks left."""
    folders = {size: tmp_path_factory.mktemp(f"ranks{size}") for size in QUICK}
    for size, folder in folders.items():
        launch(folder, size, runnable(QUICK[size]))
    return folders


def outcome(folder: Path, word: str) -> Result:
    """Return the outcome of the run named `word`."""
    result: Result = torch.load(folder / f"{word.replace(':', '-')}.pt", weights_only=False)
    return result


def assert_same(found: Result, expected: Result, tolerance: float) -> None:
    """Metrics of every step, completions and final weights agree."""
    assert found["sampled"] == expected["sampled"]
    assert [row["step"] for row in found["metrics"]] == [row["step"] for row in expected["metrics"]]
    for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        names = {name for name in theirs if not name.startswith(APART)}
        assert names == {name for name in ours if not name.startswith(APART)}
        for name in names:
            assert math.isclose(ours[name], theirs[name], rel_tol=tolerance, abs_tol=tolerance), (ours["step"], name)
    assert found["weights"].keys() == expected["weights"].keys()
    for role, weights in expected["weights"].items():
        for name, tensor in weights.items():
            torch.testing.assert_close(found["weights"][role][name], tensor, rtol=0.0, atol=tolerance)


quick_runs = [
    pytest.param(size, word, id=f"{word}-{size}")
    for size in QUICK
    for word in runnable(QUICK[size])
    if word not in CHECKS
]


@pytest.mark.parametrize(("size", "word"), quick_runs)
def test_stages_and_ranks_change_no_number(
    size: int, word: str, quick: dict[int, Path], reference: Callable[[str], Result]
) -> None:
    assert_same(outcome(quick[size], word), reference(word.split(":")[0]), tolerance=1e-4)


@pytest.mark.parametrize(("size", "word"), quick_runs)
def test_a_resumed_run_goes_on_to_the_very_same_weights(size: int, word: str, quick: dict[int, Path]) -> None:
    whole = outcome(quick[size], word)
    half = ranks.STEPS // 2
    rest = {**whole, "metrics": whole["metrics"][half:], "sampled": whole["sampled"][half:]}
    assert_same(whole["resumed"], rest, tolerance=1e-7)


def assert_continues(found: Result, whole: Result) -> None:
    """The second half of a run under another layout is that of the run itself."""
    half = ranks.STEPS // 2
    rest = {**whole, "metrics": whole["metrics"][half:], "sampled": whole["sampled"][half:]}
    assert_same(found, rest, tolerance=1e-5)


@pytest.mark.parametrize("word", [w for w in QUICK[2] if w in runnable(QUICK[2]) and w not in CHECKS])
def test_one_process_of_torch_continues_what_ranks_wrote(word: str, quick: dict[int, Path]) -> None:
    case, name = word.split(":")[0], word.replace(":", "-")
    found = ranks.resumed(quick[2], case, TorchStrategy("cpu"), name, f"{name}-torch")
    assert_continues(found, outcome(quick[2], word))


def test_other_stages_and_numbers_of_ranks_continue_what_ranks_wrote(quick: dict[int, Path]) -> None:
    """One rank, under the next stage."""
    folder, wanted = quick[2], dict(word.split(":") for word in runnable(QUICK[2]) if ":" in word)
    words = [f"{case}:{case}-{stage}:{(int(stage[0]) + 1) % 4}" for case, stage in wanted.items()]
    launch(folder, 1, words)
    for word in words:
        old = word.split(":")[1]
        assert_continues(outcome(folder, word), outcome(folder, old.replace("-", ":")))


def test_ranks_continue_what_one_process_of_torch_wrote(tmp_path: Path) -> None:
    ranks.write_data(tmp_path)
    whole = ranks.run(tmp_path, "plain", TorchStrategy("cpu"), "plain-torch")
    words = [f"plain:plain-torch:{stage}" for stage in range(4)]
    launch(tmp_path, 2, words)
    for word in words:
        assert_continues(outcome(tmp_path, word), whole)


@pytest.mark.parametrize(("size", "word"), quick_runs)
def test_transformers_loads_what_was_trained(size: int, word: str, quick: dict[int, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(quick[size] / word.replace(":", "-") / "model")
    weights = outcome(quick[size], word)["weights"]["actor"]
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_beside_the_model_is_exported_whole(quick: dict[int, Path]) -> None:
    shapes = {
        name: load_file(quick[size] / name / "model" / "heads.safetensors")["value.weight"].shape
        for size, name in ((1, "plain-3"), (2, "plain-0"))
    }
    assert set(shapes.values()) == {(1, 64)}


@pytest.mark.parametrize("size", QUICK)
def test_a_weight_that_a_step_leaves_out_has_no_gradient_in_it(size: int, quick: dict[int, Path]) -> None:
    steps = outcome(quick[size], "steps")
    for stage in ranks.EVERY:
        assert steps[stage]["norms"] == pytest.approx(steps["torch"]["norms"], rel=1e-5)


@pytest.mark.parametrize("size", QUICK)
def test_updates_too_small_for_bfloat16_are_not_lost(size: int, quick: dict[int, Path]) -> None:
    """Ten steps of a tenth of a spacing each move a weight by a spacing, if its float32 copy keeps them."""
    steps = outcome(quick[size], "steps")
    assert all(steps[stage]["moved"] > 0.6 for stage in ("torch", *ranks.EVERY))


@pytest.mark.parametrize("size", QUICK)
def test_a_gradient_that_is_not_finite_changes_no_weight_and_no_schedule_and_is_told(
    size: int, quick: dict[int, Path]
) -> None:
    steps = outcome(quick[size], "steps")
    for stage in ("torch", *ranks.EVERY):
        for dtype, found in steps[stage]["broken"].items():
            assert found == {"same": True, "finite": True, "told": [False, True], "steps": 1}, (stage, dtype)


@pytest.mark.parametrize("size", QUICK)
def test_frozen_weights_leave_the_device_and_come_back_too(size: int, quick: dict[int, Path]) -> None:
    steps = outcome(quick[size], "steps")
    for stage in ranks.EVERY:
        same, norm = steps[stage]["slept"]
        assert same and norm == pytest.approx(steps["torch"]["slept"][1], rel=1e-5)


@pytest.mark.parametrize("size", QUICK)
def test_float16_skips_a_step_that_overflows_and_halves_the_scale(size: int, quick: dict[int, Path]) -> None:
    steps = outcome(quick[size], "steps")
    norm = steps["torch"]["overflow"]["told"][1]["grad_norm"]
    for stage in ("torch", *ranks.EVERY[1:]):
        found = steps[stage]["overflow"]
        assert (found["same"], found["changed"], found["steps"]) == (True, True, 1), stage
        assert not math.isfinite(found["told"][0]["grad_norm"]), stage
        assert [told["loss_scale"] for told in found["told"]] == [65536.0, 32768.0], stage
        assert found["told"][1]["grad_norm"] == pytest.approx(norm, rel=0.01), stage


def test_mistakes_that_only_ranks_can_make_are_one_line_each(quick: dict[int, Path]) -> None:
    told = outcome(quick[2], "wrong")
    assert told["batch"] == "batch_size=… 1 is too small: some of the 2 ranks have no prompt to sample on; raise it"
    assert "cannot train in float16 at stage 0" in told["dtype"]
    assert told["hpz"] == "DeepSpeed(hpz=…) 3 does not divide the 2 ranks; choose a number that does"
    assert "the model has no module of class 'Experts'; name one of" in told["leaves"]
    assert told["groups"] == "2 ranks cannot form groups of 3 that share rows; start a multiple of 3 ranks"
    assert told["heads"].endswith(
        "2 must divide the 1 attention heads, and must divide the 1 key heads or be a multiple of them; "
        "choose another number"
    )
    assert "cuts packed rows, which this model's attention 'sdpa' does not take" in told["padded"]


# ----------------------------------------------------------------------------------------------------------------------
# everything, in minutes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.skipif(not runnable(["lora"]), reason="needs rlhf-algos, and peft")
def test_adapters_change_no_number_either(tmp_path: Path, reference: Callable[[str], Result]) -> None:
    """LoRA on two ranks, with the optimizer's state sharded and with the weights sharded."""
    words = ["lora:2", "lora:3"]
    launch(tmp_path, 2, words)
    for word in words:
        found = outcome(tmp_path, word)
        assert_same(found, reference("lora"), tolerance=1e-4)
        rest = {key: found[key][ranks.STEPS // 2 :] for key in ("metrics", "sampled")}
        assert_same(found["resumed"], {**found, **rest}, tolerance=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not runnable(["wide:2q"]), reason="needs rlhf-algos")
def test_four_ranks_that_share_rows_change_no_number(tmp_path: Path, reference: Callable[[str], Result]) -> None:
    """Four ranks per row, and two pairs of ranks with rows of their own."""
    words = ["wide:2q", "wide:0s", "wide:3s"]
    launch(tmp_path, 4, words)
    for word in words:
        assert_same(outcome(tmp_path, word), reference("wide"), tolerance=1e-4)


def fits(case: str, stage: str) -> bool:
    """Return False for a loss of whole distributions where ranks share rows, which is refused."""
    return not (case == "distill" and stage.endswith("s"))


@pytest.fixture(scope="module", params=[1, 2])
def cross(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """All cases under all stages."""
    folder = tmp_path_factory.mktemp(f"cross{request.param}")
    words = [f"{case}:{stage}" for case in ranks.CASES for stage in CROSS[request.param] if fits(case, stage)]
    launch(folder, request.param, runnable(words))
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(ranks.CASES))
@pytest.mark.parametrize("stage", sorted(set().union(*CROSS.values())))
def test_every_algorithm_under_every_stage(
    case: str, stage: str, cross: tuple[int, Path], reference: Callable[[str], Result]
) -> None:
    if not runnable([case]):
        pytest.skip("needs rlhf-algos, and peft for adapters")
    if stage not in CROSS[cross[0]] or not fits(case, stage):
        pytest.skip("runs on another number of ranks, or is refused")
    found = outcome(cross[1], f"{case}:{stage}")
    assert_same(found, reference(case), tolerance=BF16_TOLERANCE if case == "bf16" else 1e-4)
    rest = {key: found[key][ranks.STEPS // 2 :] for key in ("metrics", "sampled")}
    assert_same(found["resumed"], {**found, **rest}, tolerance=1e-7)
    if case == "lora":  # what is exported are the adapters, which rlhf-core tests
        return
    exported = load_file(cross[1] / f"{case}-{stage}" / "model" / "model.safetensors")
    assert all(torch.equal(exported[name].float(), found["weights"]["actor"][name]) for name in exported)
