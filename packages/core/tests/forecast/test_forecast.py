"""A forecast is what a run takes: memory against the allocator's own count, parts against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_core import make_config
from rlhf_core.cli.app import main
from rlhf_core.contract.memory import ModelSize, RoleMemory
from rlhf_core.errors import UsageError
from rlhf_core.forecast.forecast import Forecast, forecast
from rlhf_core.forecast.options import GPUS, PlanOptions
from rlhf_core.forecast.seconds import Rates, forward_operations, training_seconds
from rlhf_core.forecast.tracker import MemoryTracker
from rlhf_core.forecast.workload import Cells, Workload
from rlhf_core.testing import compare_memory
from rlhf_core.training.planner import make_plan

pytest.importorskip("rlhf_algos")

SMALL = "tiny:hidden=64,layers=2,heads=2,kv_heads=1,intermediate=192,vocab=259"
PARAMETERS = 259 * 64 + 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64) + 64
"""Of `SMALL`: the tied embedding; per layer queries and outputs, keys and values, the feed-forward part, two norms; a norm."""


def config_of(algorithm: str, prompt: int, completion: int, rows: int, output: str = "unused", **options: Any) -> Any:
    """Return a run on rows of exactly these lengths, in bytes, which are the tokens of `tiny`; EOS included."""
    answer = "b" * (completion - 1)
    columns = {"chosen": answer, "rejected": answer} if algorithm in ("dpo", "rm") else {"completion": answer}
    data = [{"prompt": "a" * prompt, **({} if "reward" in options else columns)} for _ in range(rows)]
    return make_config(algorithm, data=data, steps=2, batch_size=rows, output=output, **options)


WIDE = "tiny:hidden=128,layers=3,heads=4,kv_heads=2,intermediate=384,vocab=2000"


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sft", {"actor": {"gradient_checkpointing": True}, "dtype": "bfloat16"}),
        ("dpo", {"actor": {"lora": {"rank": 4}}, "micro_tokens": 400}),
    ],
    ids=["bfloat16, recomputed", "pairs with adapters, micro-batches"],
)
def test_the_forecast_is_within_a_tenth_of_what_the_allocator_counts(
    algorithm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    if "lora" in options["actor"]:
        pytest.importorskip("peft")
    sizes = {"rows": 6, "prompt": 60, "completion": 60, "pairs": algorithm == "dpo"}
    found, measured = compare_memory(algorithm, tmp_path, model=WIDE, **sizes, **options)
    assert found == pytest.approx(measured, rel=0.1)


def parts(**options: Any) -> Forecast:
    return forecast(
        config_of("sft", 16, 16, 8, model=SMALL, **options), PlanOptions(prompt_tokens=16, completion_tokens=16)
    )


def test_states_of_adamw_are_four_numbers_per_weight() -> None:
    memory, size = parts().roles["actor"].memory, parts().roles["actor"].size
    assert (size.parameters, size.trained, size.layers) == (PARAMETERS, PARAMETERS, 2)
    assert memory.weights == 4 * PARAMETERS + 32 * 4  # and the frequencies of the rotary embedding
    assert memory.gradients == 4 * PARAMETERS
    assert memory.optimizer == pytest.approx(8 * PARAMETERS, rel=1e-3)


def test_adapters_leave_gradients_and_states_to_themselves() -> None:
    pytest.importorskip("peft")
    memory = parts(actor={"lora": {"rank": 4}}, dtype="bfloat16").roles["actor"].memory
    adapters = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 192) + (192 + 64))
    assert memory.gradients == 4 * adapters
    assert memory.weights == 2 * PARAMETERS + 4 * adapters + 32 * 4


def test_a_graph_holds_what_a_llama_layer_keeps() -> None:
    """Per token and layer: three of each norm, q, k, v, the output of attention twice, and four wide ones."""
    tokens, found = 8 * 32, parts().roles["actor"]
    layer = 2 * 3 * 64 + 64 + 2 * 32 + 2 * 64 + 4 * 192
    assert found.graph == pytest.approx(4 * tokens * (2 * layer + 3 * 64 + 259 // 2), rel=0.03)


def test_recomputing_keeps_the_inputs_of_layers_alone() -> None:
    plain, recomputed = parts().roles["actor"], parts(actor={"gradient_checkpointing": True}).roles["actor"]
    assert recomputed.graph < 0.4 * plain.graph
    assert recomputed.memory.weights == plain.memory.weights


def test_several_micro_batches_hold_gradients_and_activations_at_once() -> None:
    one, several = parts().roles["actor"], parts(micro_tokens=64).roles["actor"]
    assert (one.rounds, one.rows, several.rounds, several.rows) == (1, 8, 4, 2)
    assert one.memory.overlap > 0.8 * one.memory.gradients
    assert several.memory.overlap == 0
    assert several.graph == pytest.approx(one.graph / 4, rel=0.01)


def test_a_reference_without_adapters_of_its_own_holds_no_weights() -> None:
    pytest.importorskip("peft")
    options: dict[str, Any] = {"reward": "length", "model": SMALL, "algorithm": {"use": "grpo", "kl": {"coef": 0.1}}}
    algorithm = options.pop("algorithm")
    shared = config_of(algorithm, 16, 16, 4, actor={"lora": {"rank": 4}}, **options)
    apart = config_of(algorithm, 16, 16, 4, **options)
    assert forecast(shared, PlanOptions()).roles["reference"].memory.weights == 0
    assert forecast(apart, PlanOptions()).roles["reference"].memory.weights == 4 * PARAMETERS + 32 * 4


def test_the_cache_is_keys_and_values_of_every_token() -> None:
    config = config_of("grpo", 16, 16, 4, reward="length", model=SMALL, sampling={"n": 4, "max_new_tokens": 16})
    role = forecast(config, PlanOptions(prompt_tokens=16)).roles["actor"]
    assert role.size.cache_bytes == 2 * 2 * 32 * 4
    rows, length = 16, 32
    assert role.memory.cache == rows * length * role.size.cache_bytes * 2 + rows * 259 * 16


def test_micro_batches_are_cut_as_training_cuts_them() -> None:
    plan = make_plan(config_of("dpo", 30, 20, 10, model=SMALL, micro_tokens=300))
    load = Workload.for_run(plan, PlanOptions(prompt_tokens=30, completion_tokens=20), 2)
    assert load.training(plan.roles["actor"]) == Cells(rows=6, prompt=30, completion=20, rounds=2)  # 5 pairs a rank
    assert load.reading(plan.roles["reference"]) == Cells(rows=6, prompt=30, completion=20, rounds=2)


def test_operations_are_six_per_weight_and_token() -> None:
    found = forecast(
        config_of("sft", 16, 16, 8, model=SMALL),
        PlanOptions(prompt_tokens=16, completion_tokens=16, tflops=1.0, gb_s=1e9, gpu_gib=1),
    )
    body = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192)
    forward = 8 * (32 * (2 * body + 2 * 128 * 32) + 2 * 64 * 259 * 16)
    (phase,) = found.phases
    assert phase.seconds == pytest.approx(3 * forward / 1e12, rel=1e-3)


def test_it_says_whether_a_device_has_room() -> None:
    found = parts()
    assert found.fits is None
    exact = found.peak / 2**30
    assert replace(found, device_bytes=int(found.peak / 0.92) + 2, options=PlanOptions()).fits
    assert not replace(found, device_bytes=int(exact * 2**30), options=PlanOptions()).fits
    assert replace(found, device_bytes=int(exact * 2**30), options=PlanOptions(reserve=0)).fits


def test_the_command_prints_the_table_and_fails_where_nothing_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a"}) + "\n", encoding="utf-8")
    words = (
        f"plan grpo --model {SMALL} --reward length --data json --data.path {rows} --plan.gpus 2 --batch-size 4".split()
    )
    assert main([*words, "--plan.gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "actor (trained)" in shown and "train actor" in shown and "fits" in shown and "seconds" in shown
    assert main([*words, "--plan.gpu-gib", "0.0001"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*words, "--plan.gpu", "h100", "--plan.json", "True"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["roles"]["actor"]["memory"]["weights"] == 4 * PARAMETERS + 32 * 4
    assert not list(tmp_path.glob("output*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plan.gpu h10", "--plan.gpu h10: unknown GPU type (did you mean 'h100'?)"),
        ("--plan.gpus 0", "--plan.gpus must be at least 1, not 0"),
        ("--plan.gpuss 2", "unknown flag --plan.gpuss; did you mean --plan.gpus"),
        ("--steppes 2", "unknown flag --steppes; did you mean --steps"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*"plan grpo --model tiny --reward length --data prompts".split(), *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_named_types_have_positive_numbers() -> None:
    assert all(gpu.gib > 0 and gpu.tflops > 0 and gpu.gb_s > 0 for gpu in GPUS.values())


def test_a_strategy_may_say_its_own() -> None:
    from rlhf_core.strategy.torch import TorchStrategy

    class Halves(TorchStrategy):
        def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
            return replace(whole, optimizer=whole.optimizer // ranks)

    config = replace(
        config := config_of("sft", 16, 16, 8, model=SMALL), providers={**config.providers, "strategy": Halves()}
    )
    alone, both = (forecast(config, PlanOptions(gpus=n)).roles["actor"].memory for n in (1, 2))
    assert both.optimizer == alone.optimizer // 2


def test_weights_that_a_strategy_gathers_are_there_while_the_process_samples() -> None:
    from rlhf_core.strategy.torch import TorchStrategy

    class Gathers(TorchStrategy):
        def memory(self, whole: RoleMemory, size: ModelSize, ranks: int) -> RoleMemory:
            return replace(whole, gathered=10**9)

    whole = config_of("grpo", 16, 16, 8, model=SMALL, reward="length")
    gathering = replace(whole, providers={**whole.providers, "strategy": Gathers()})
    found, expected = (forecast(each, PlanOptions()).phases for each in (gathering, whole))
    more = {phase.name: phase.bytes - other.bytes for phase, other in zip(found, expected, strict=True)}
    assert more == {"sample actor": 10**9, "read reference": 0, "train actor": 0}


def test_devices_that_share_rows_are_whole_groups_that_divide_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Four devices in groups of two have the rows of two devices, and each device does half of the work on its group's rows."""
    from rlhf_core.strategy.torch import TorchStrategy

    class Pairs(TorchStrategy):
        ranks_per_row = 2

    alone = config_of("sft", 16, 16, 8, model=SMALL)
    pairs = replace(alone, providers={**alone.providers, "strategy": Pairs()})
    stated = {"tflops": 1.0, "gb_s": 1e6}
    found, expected = forecast(pairs, PlanOptions(gpus=4, **stated)), forecast(alone, PlanOptions(gpus=2, **stated))
    ours, theirs = found.roles["actor"], expected.roles["actor"]
    assert (ours.rows, ours.rounds) == (theirs.rows, theirs.rounds)
    assert ours.memory.activations == theirs.memory.activations > 0
    for phase, whole in zip(found.phases, expected.phases, strict=True):
        assert phase.seconds and whole.seconds == pytest.approx(2 * phase.seconds, rel=1e-3)
    for gpus in (1, 3):
        with pytest.raises(UsageError, match=rf"plan.gpus.* {gpus}: devices cannot form groups of 2 .*multiple of 2$"):
            forecast(pairs, PlanOptions(gpus=gpus))


def test_adapters_are_not_charged_for_gradients_of_frozen_matrices() -> None:
    size = ModelSize(100, 100, 10, 10, 2, 0, 4, 0)
    passes: Any = type("Passes", (), {"size": size, "matrix": 50, "head": 10, "attention": 0})
    rates = Rates(1.0, 1.0, "stated")
    assert forward_operations(passes, 1, 3, 2) == 5 * 100 + 2 * 20
    assert training_seconds(passes, 6.0, rates, recomputes=False) == 18.0
    passes.size = replace(size, trained=10)
    assert training_seconds(passes, 6.0, rates, recomputes=True) == 18.0


def test_nothing_of_a_large_model_is_held() -> None:
    config = config_of(
        "sft", 16, 16, 8, model="tiny:hidden=8192,layers=80,heads=64,kv_heads=8,intermediate=28672,vocab=128000"
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        found = forecast(config, PlanOptions(prompt_tokens=16, completion_tokens=16))
    assert found.roles["actor"].size.parameters > 60e9
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max(events, default=0) < 2**24 and torch.empty(0).untyped_storage().nbytes() == 0


def test_memory_at_the_address_of_a_freed_weight_is_counted() -> None:
    module = torch.nn.Linear(64, 64, bias=False)
    with MemoryTracker(module) as tracker:
        kept = []
        for _ in range(200):  # one of them gets the address of the storage that is freed before it
            module.weight.data = torch.zeros(64, 64)
            kept.append(torch.zeros(64, 64))
        assert tracker.live == (len(kept) + 1) * 64 * 64 * 4


@pytest.mark.skipif(find_spec("rlhf_strategy_deepspeed") is None, reason="needs rlhf-strategy-deepspeed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_of_zero_holds_eighteen_bytes_per_weight_in_bfloat16(stage: int) -> None:
    """Weights 2, gradients 4, float32 copies 4, AdamW's moments 8: the last 12 over ranks, and the others by stage.

    Stage 1 adds gradients of two bytes to float32 sums that are always there.
    """
    P, R = PARAMETERS, 4
    strategy = {"use": "deepspeed", "stage": stage}
    config = config_of("sft", 8, 8, 4, model=SMALL, dtype="bfloat16", strategy=strategy)
    memory = forecast(config, PlanOptions(gpus=R, gpu_gib=80)).roles["actor"].memory
    expected = {1: (2 * P, 2 * P), 2: (2 * P, 4 * P // R), 3: (2 * P // R, 4 * P // R)}[stage]
    assert (memory.weights, memory.gradients) == pytest.approx(expected, rel=0.01)
    assert stage > 1 or memory.buffers == 4 * P
    assert memory.optimizer == pytest.approx(12 * P / R, rel=0.01)
