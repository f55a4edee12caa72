"""Memory that `rlhf-run plan` states for FSDP2: closed forms, and the allocator's own count on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core import ModelSize, RoleMemory
from rlhf_core.testing import compare_memory
from rlhf_strategy_fsdp2.strategy import FSDP2

SMALL = "tiny:layers=4,hidden=256,heads=8,kv_heads=4,intermediate=1024"
RECOMPUTED: dict[str, Any] = {"actor": {"gradient_checkpointing": True}}
WHOLE = RoleMemory(weights=2000, gradients=2000, optimizer=8000, activations=500, overlap=300, update=60, inference=70)
"""A whole copy of 1,000 parameters that are trained in bfloat16."""


def size_of(trained: int = 1000, **changes: Any) -> ModelSize:
    """Nine layers of 100 parameters, and 100 outside of them, in bfloat16."""
    numbers = {"layer": 100, "root": 100, "layers": 9, "vocabulary": 10, "compute_bytes": 2, "cache_bytes": 8}
    return ModelSize(1000, trained, **{**numbers, **changes})


def test_a_rank_holds_its_share_and_what_two_units_gather() -> None:
    found = FSDP2().memory(WHOLE, size_of(), 2)
    assert (found.weights, found.gradients, found.optimizer) == (4 * 1000 // 2, 4 * 1000 // 2, 8000 // 2)
    root = 2 * 2 * 100  # weights and gradients
    unit = 2 * 100
    waiting = 4 * 100  # float32 gradients of the unit before, which are being reduced
    assert found.activations == 500 + root + 3 * unit + waiting
    assert found.overlap == (300 + 2 * 4 * 100) // 2  # this unit and the next have no reduced gradients yet
    assert found.update == root + 4 * 100
    assert found.inference == 70 + 2 * (100 + 2 * 100)
    assert found.gathered == 2 * (1000 + 100)


def test_layers_that_are_kept_are_all_there() -> None:
    freed, kept = (FSDP2(reshard=reshard).memory(WHOLE, size_of(), 2) for reshard in (True, False))
    assert kept.activations - freed.activations == 2 * (900 + 100) - 2 * 300


def test_a_frozen_role_holds_weights_and_gathers_them_to_be_read() -> None:
    frozen = FSDP2().memory(RoleMemory(weights=2000, inference=70), size_of(trained=0), 4)
    assert (frozen.weights, frozen.inference, frozen.training) == (500, 70 + 2 * 300, 0)
    assert FSDP2().memory(RoleMemory(), size_of(trained=0, shares_base=True), 4).weights == 0


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("sft", {"rows": 8, **RECOMPUTED}),
        pytest.param("sft", {"rows": 8, "prompt": 128, "completion": 128}, marks=pytest.mark.slow),
        pytest.param("sft", {"rows": 16, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("sft", {"rows": 8, "actor": {"lora": {"rank": 4}}}, marks=pytest.mark.slow),
        pytest.param(
            {"use": "grpo", "kl": {"coef": 0.1}},
            {"rows": 4, "completion": 32, "reward": "length", "sampling": {"n": 4, "max_new_tokens": 32}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["recomputed", "long rows", "bfloat16", "adapters", "sampling, and a reference"],
)
def test_the_forecast_is_within_a_tenth_of_what_a_rank_takes(
    algorithm: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    if "lora" in options.get("actor", {}):
        pytest.importorskip("peft")
    found, measured = compare_memory(algorithm, tmp_path, ranks=2, model=SMALL, strategy=FSDP2(), **options)
    assert found == pytest.approx(measured, rel=0.1)
