"""Memory that `rlhf-run plan` states for ZeRO: closed forms by stage, and the allocator's own count on two ranks."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contract.memory import ModelSize, RoleMemory
from rlhf_core.testing import compare_memory
from rlhf_strategy_deepspeed.strategy import DeepSpeed

LAYERS, HIDDEN, INNER, VOCABULARY = 6, 512, 1536, 259
MODEL = f"tiny:layers={LAYERS},hidden={HIDDEN},heads=16,kv_heads=8,intermediate={INNER},vocab={VOCABULARY}"
LAYER = 3 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
"""Parameters of a layer: queries, outputs, and half as many keys and values each; the feed-forward part; two norms."""
PARAMETERS = VOCABULARY * HIDDEN + LAYERS * LAYER + HIDDEN
BUCKET = 2_500_000
"""Numbers of a bucket that a layer does not fit into."""

WHOLE = RoleMemory(weights=4000, gradients=4000, optimizer=8000, activations=500, overlap=300, update=60, inference=70)
"""A whole copy of 1,000 parameters in float32."""
NARROW = RoleMemory(weights=2000, gradients=2000, optimizer=8000, activations=500, overlap=150, update=60, inference=70)
"""The same in bfloat16."""


def size_of(compute_bytes: int = 4, **changes: Any) -> ModelSize:
    """Nine layers of 100 parameters, and 100 outside of them, all trained."""
    numbers = {"trained": 1000, "layer": 100, "root": 100, "layers": 9, "vocabulary": 10, "cache_bytes": 8}
    return ModelSize(1000, **{**numbers, **changes}, compute_bytes=compute_bytes)


def test_stage_0_flattens_at_most_what_deepspeed_reduces_in_one_call() -> None:
    engine = pytest.importorskip("deepspeed.runtime.engine")
    many = 7 * 10**8
    found = [DeepSpeed(stage=0).memory(WHOLE, size_of(trained=count), 2) for count in (1000, many)]
    assert [each.update for each in found] == [4 * 1000, 4 * engine.MEMORY_OPT_ALLREDUCE_SIZE]
    assert (found[0].weights, found[0].gradients, found[0].optimizer, found[0].buffers) == (4000, 4000, 8000, 0)


def test_a_pass_of_stage_1_has_a_whole_bucket_and_all_gradients() -> None:
    large, small = (DeepSpeed(stage=1, bucket=bucket).memory(WHOLE, size_of(), 2) for bucket in (10**6, 100))
    assert large.activations == 500 + 4 * 10**6 and small.activations == 500 + 4 * 100
    assert (small.gradients, small.optimizer) == (4000, (8000 + 4000) // 2)
    assert large.update == 4 * 10**6  # a copy of the gradients in it is as large as those that moved into it
    assert small.update == 4000 // 2  # the share of a rank, while others' gradients are there


def test_stage_1_in_bfloat16_always_has_float32_gradients() -> None:
    found = DeepSpeed(stage=1).memory(NARROW, size_of(2), 2)
    assert (found.buffers, found.gradients, found.activations) == (4000, 2000, 500)
    assert found.update == 4000 + 2000  # flattened, and in the dtype that is sent
    apart = DeepSpeed(stage=1, offload="optimizer", bucket=100).memory(NARROW, size_of(2), 2)
    assert (apart.buffers, apart.gradients, apart.optimizer) == (0, 4000, 0)


def test_buckets_of_stage_2_are_two_and_hold_the_gradients_that_fit() -> None:
    large, small = (DeepSpeed(stage=2, bucket=bucket).memory(WHOLE, size_of(), 2) for bucket in (10**6, 100))
    assert large.training == 2 * 4 * 10**6 + 4 * 1000  # two buckets, and what is sent of one
    assert small.gradients + small.activations - small.overlap == 2000 + 500 + 3 * 4 * 100
    assert small.training == 2000 + 2000 + 60 // 2  # the update copies its gradients into one piece
    alone = DeepSpeed(stage=2, bucket=100, overlap=False).memory(WHOLE, size_of(), 2)
    assert small.activations - alone.activations == 4 * 100
    narrow = DeepSpeed(stage=2, bucket=100).memory(NARROW, size_of(2), 2)
    assert narrow.training == 2000 + 500 + 3 * 2 * 100


def test_stage_3_gathers_as_much_as_its_file_says(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage3_max_live_parameters": 250}}), encoding="utf-8")
    stage = DeepSpeed(stage=3, bucket=120, config=str(file))
    trained = stage.memory(WHOLE, size_of(), 2)
    assert trained.activations == 500 + 4 * (250 + 120) + 4 * 120
    assert trained.resident == (4000 + 8000 + 4000 + 4000) // 2 + 4 * 120
    assert trained.training == trained.activations
    assert (trained.inference, trained.gathered) == (70 + 4 * (250 + 120), 4000)
    frozen = stage.memory(RoleMemory(weights=4000, inference=70), size_of(trained=0), 2)
    assert (frozen.resident, frozen.inference, frozen.activations) == (2000, 70 + 4 * (250 + 120), 0)


def test_ranks_of_a_node_hold_a_second_copy_of_the_weights_together(tmp_path: Path) -> None:
    """DeepSpeed makes it for trained roles, where the weights of a rank are: not on the device if they are offloaded."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"zero_hpz_partition_size": 2}}), encoding="utf-8")
    plain = DeepSpeed(stage=3).memory(NARROW, size_of(2), 8)
    for stage in (DeepSpeed(stage=3, hpz=2), DeepSpeed(stage=3, config=str(file))):
        assert stage.memory(NARROW, size_of(2), 8).resident - plain.resident == 2 * 1000 // 2
        frozen, alone = (each.memory(NARROW, size_of(2, trained=0), 8) for each in (stage, DeepSpeed(stage=3)))
        assert frozen == alone
    away, without = (DeepSpeed(stage=3, offload="all", hpz=hpz).memory(NARROW, size_of(2), 8) for hpz in (2, None))
    assert away == without


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_ranks_that_share_rows_hold_their_part_of_the_activations(kind: Any) -> None:
    shared = DeepSpeed(stage=1, bucket=100, sequence=2, sequence_kind=kind).memory(WHOLE, size_of(), 4)
    alone = DeepSpeed(stage=1, bucket=100).memory(WHOLE, size_of(), 4)
    assert (alone.activations - shared.activations, alone.inference - shared.inference) == (500 // 2, 70 // 2)
    assert (alone.overlap, shared.overlap) == (300, 500 // 2)
    assert shared.resident == alone.resident


def main_memory(stage: int, compute_bytes: int) -> int:
    """Return the bytes of what one of two ranks offloads: weights, two moments and gradients in float32, and copies."""
    copy = 4 if stage == 3 else compute_bytes  # sums of gradients; a buffer of updated weights
    sums = 4 if stage == 2 and compute_bytes == 4 else 0
    return (16 + copy + sums) * PARAMETERS // 2


FORECASTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 0": ({"stage": 0}, {}),
    "stage 1": ({"stage": 1}, {}),
    "stage 1, small buckets": ({"stage": 1, "bucket": BUCKET}, {}),
    "stage 1, bfloat16": ({"stage": 1}, {"dtype": "bfloat16"}),
    "stage 2": ({"stage": 2}, {}),
    "stage 2, small buckets": ({"stage": 2, "bucket": BUCKET}, {}),
    "stage 2, bfloat16": ({"stage": 2}, {"dtype": "bfloat16", "rows": 16}),
    "stage 2, micro-batches": ({"stage": 2, "bucket": BUCKET}, {"micro_tokens": 256}),
    "stage 3": ({"stage": 3}, {}),
    "stage 3, small buckets": ({"stage": 3, "bucket": BUCKET}, {}),
    "stage 3, bfloat16": ({"stage": 3}, {"dtype": "bfloat16", "rows": 16}),
    "stage 3, a second copy": ({"stage": 3, "hpz": 2}, {}),
    "stage 1, rows shared": ({"stage": 1, "bucket": BUCKET, "sequence": 2}, {"prompt": 200, "completion": 200}),
    "stage 3, adapters": ({"stage": 3}, {"actor": {"lora": {"rank": 4}}}),
    "stage 1, offload": ({"stage": 1, "bucket": BUCKET, "offload": "optimizer"}, {}),
    "stage 2, offload": ({"stage": 2, "bucket": BUCKET, "offload": "optimizer"}, {}),
    "stage 3, offload": ({"stage": 3, "bucket": BUCKET, "offload": "optimizer"}, {}),
}
"""Options of the strategy and of the run."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("case", FORECASTS)
def test_the_forecast_is_within_a_tenth_of_what_a_rank_takes(case: str, tmp_path: Path) -> None:
    """On a CPU what is offloaded lies in the memory that is measured."""
    pytest.importorskip("rlhf_algos")
    strategy, options = FORECASTS[case]
    if "lora" in options.get("actor", {}):
        pytest.importorskip("peft")
    stated = {"use": "deepspeed", **strategy}
    found, measured = compare_memory("sft", tmp_path, ranks=2, model=MODEL, strategy=stated, **{"rows": 8, **options})
    if "offload" in strategy:
        found += main_memory(strategy["stage"], 4)
    print(
        f"{case}: forecast {found / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB, ratio {found / measured:.2f}"
    )
    assert found == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_a_forward_pass_of_stage_3_leaves_no_gathered_weights_behind(tmp_path: Path) -> None:
    """One layer is live at a time, though nothing is computed again: autograd would keep a view of every weight."""
    pytest.importorskip("rlhf_algos")
    file = tmp_path / "zero.json"
    limits = {"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0}
    file.write_text(json.dumps({"zero_optimization": limits}), encoding="utf-8")
    stage = {"use": "deepspeed", "stage": 3, "bucket": BUCKET}
    options: dict[str, Any] = {"ranks": 2, "model": MODEL, "rows": 8}
    _, whole = compare_memory("sft", tmp_path / "whole", strategy=stage, **options)
    found, measured = compare_memory("sft", tmp_path / "layer", strategy={**stage, "config": str(file)}, **options)
    print(
        f"forecast {found / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB, all gathered {whole / 2**20:.1f} MiB"
    )
    assert found == pytest.approx(measured, rel=0.1)
    assert whole - measured > 4 * (PARAMETERS - 2 * LAYER) * 0.8
