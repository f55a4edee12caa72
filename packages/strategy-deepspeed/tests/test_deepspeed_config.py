"""DeepSpeed's configuration: the run's decisions, good defaults, and a user's file that may add to them but not contradict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.contract.memory import ModelSize, RoleMemory
from rlhf_core.contract.optimizers import AdamW, OptimizerProvider
from rlhf_core.errors import UsageError
from rlhf_core.testing.batches import make_batch
from rlhf_strategy_deepspeed.config import configuration
from rlhf_strategy_deepspeed.engine import forward
from rlhf_strategy_deepspeed.strategy import DeepSpeed
from rlhf_strategy_deepspeed.trainable import DeepSpeedTrainable

OPTIM = AdamW(max_grad_norm=0.5)


@dataclass(frozen=True)
class WholeMatrices(OptimizerProvider):
    """An optimizer that needs whole matrices."""


def given(folder: Path, content: Any, **options: Any) -> DeepSpeed:
    """The strategy with a user's file."""
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return DeepSpeed(config=str(path), **options)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_backward_never_ends_a_step_and_master_weights_are_float32(stage: Any, dtype: str) -> None:
    config = configuration(DeepSpeed(stage=stage), dtype, OPTIM)
    assert config["managed_gradient_accumulation"] is False
    assert config["zero_optimization"]["stage"] == stage
    low = dtype == "bfloat16"
    narrow = dtype != "float32" and stage > 0
    assert config["bf16"] == {"enabled": low and stage > 0}
    assert config["fp16"]["enabled"] == (dtype == "float16" and stage > 0)
    assert config.get("data_types", {}) == ({"grad_accum_dtype": "fp32"} if narrow else {})
    assert ("torch_autocast" in config) == (low and stage == 0)


@pytest.mark.parametrize(
    ("options", "trained", "frozen"),
    [
        ({"stage": 2}, set(), set()),
        ({"stage": 2, "offload": "optimizer"}, {"offload_optimizer"}, set()),
        ({"stage": 3, "offload": "optimizer"}, {"offload_optimizer"}, set()),
        ({"stage": 3, "offload": "all"}, {"offload_optimizer", "offload_param"}, {"offload_param"}),
    ],
)
def test_what_is_offloaded_is_in_main_memory(options: dict[str, Any], trained: set[str], frozen: set[str]) -> None:
    for optim, parts in ((OPTIM, trained), (None, frozen)):
        zero = configuration(DeepSpeed(**options), "float32", optim)["zero_optimization"]
        found = {name: zero[name] for name in ("offload_optimizer", "offload_param") if name in zero}
        assert found == {part: {"device": "cpu", "pin_memory": True} for part in parts}


def test_a_file_may_tune_what_is_offloaded_and_fix_the_scale_of_float16(tmp_path: Path) -> None:
    user = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
        "fp16": {"loss_scale": 128},
    }
    config = configuration(given(tmp_path, user, offload="optimizer"), "float16", OPTIM)
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert (config["fp16"]["enabled"], config["fp16"]["loss_scale"]) == (True, 128)


@pytest.mark.parametrize(
    ("options", "part", "bytes_held"),
    [
        ({"stage": 0, "tensor": 2}, "weights", 4 * (100 + 900 // 2)),
        ({"stage": 0, "tensor": 2}, "optimizer", 8 * (100 + 900 // 2)),
        ({"stage": 2}, "optimizer", (8 + 4) * 1000 // 2),
        ({"stage": 2, "offload": "optimizer"}, "optimizer", 0),
        ({"stage": 3}, "weights", 4000 // 2),
        ({"stage": 3, "offload": "optimizer"}, "weights", 4000 // 2),
        ({"stage": 3, "offload": "all"}, "weights", 0),
    ],
)
def test_offloaded_states_need_no_memory_of_the_device(options: dict[str, Any], part: str, bytes_held: int) -> None:
    size = ModelSize(1000, 1000, layer=100, root=100, layers=9, vocabulary=10, compute_bytes=4, cache_bytes=8)
    whole = RoleMemory(weights=4000, gradients=4000, optimizer=8000)
    assert getattr(DeepSpeed(**options).memory(whole, size, 2), part) == bytes_held


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_of_whole_matrices_is_refused_where_they_are_cut(stage: Any) -> None:
    module = torch.nn.Linear(2, 2)
    module.compute_dtype = torch.float32  # type: ignore[assignment]
    with pytest.raises(
        UsageError, match=f"cuts matrices into flat shards at stage {stage}, but the optimizer"
    ) as caught:
        DeepSpeedTrainable(DeepSpeed(stage=stage), module, WholeMatrices(), 1, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_an_optimizer_of_whole_matrices_is_refused_where_ranks_share_layers() -> None:
    module = torch.nn.Linear(2, 2)
    module.compute_dtype = torch.float32  # type: ignore[assignment]
    with pytest.raises(UsageError, match="2 cuts matrices, but the optimizer WholeMatrices needs whole ones"):
        DeepSpeedTrainable(DeepSpeed(stage=0, tensor=2), module, WholeMatrices(), 1, torch.device("cpu"))


def test_only_stages_that_tell_the_norm_clip_by_themselves() -> None:
    clipped = [configuration(DeepSpeed(stage=stage), "float32", OPTIM)["gradient_clipping"] for stage in (0, 1, 2, 3)]
    assert clipped == [0.0, 0.5, 0.5, 0.5]
    assert "gradient_clipping" not in configuration(DeepSpeed(stage=3), "float32", None)


def test_a_file_adds_settings_and_changes_defaults_and_may_leave_the_rest_to_us(tmp_path: Path) -> None:
    user = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "overlap_comm": False, "sub_group_size": 1000, "reduce_bucket_size": "auto"},
        "fp16": {"enabled": False, "loss_scale_window": 100},
        "wall_clock_breakdown": True,
    }
    config = configuration(given(tmp_path, user, stage=3), "float32", OPTIM)
    zero = config["zero_optimization"]
    assert (zero["overlap_comm"], zero["sub_group_size"], zero["reduce_bucket_size"]) == (False, 1000, 50_000_000)
    assert config["wall_clock_breakdown"] is True
    assert config["gradient_clipping"] == 0.5
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("user", "options", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            {},
            "gradient_clipping is 1.0, but the options of the run set it to 0.5; remove it",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            {},
            "zero_optimization.stage is 3, but the options of the run set it to 2",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": 7}},
            {"bucket": 9},
            "reduce_bucket_size is 7, but .* set it to 9",
        ),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled is True, but the options of the run set it to False"),
        ({"train_batch_size": 64}, {}, "remove train_batch_size: batch_size"),
        (
            {"optimizer": {"type": "Adam", "params": {}}},
            {},
            "remove optimizer.type: --<role>.optim chooses the optimizer",
        ),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled is True, but the options of the run set it to False"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            {},
            "remove zero_optimization.offload_optimizer.device: offload = .optimizer. sets it",
        ),
        ("{", {}, "is not JSON"),
        ([1], {}, "must hold a JSON object, not list"),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused_by_key(
    tmp_path: Path, user: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        configuration(given(tmp_path, user, **options), "float32", OPTIM)
    assert "\n" not in str(caught.value)
    assert "mine.json" in str(caught.value)


def test_a_file_that_switches_a_refused_section_off_is_fine(tmp_path: Path) -> None:
    user = {"zero_optimization": {"offload_optimizer": {"device": "none", "pin_memory": True}}}
    configuration(given(tmp_path, user), "float32", OPTIM)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read config .*none.json: No such file"):
        configuration(DeepSpeed(config=str(tmp_path / "none.json")), "float32", OPTIM)


def test_images_in_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without any would wait for ever for what the others gather."""
    batch = make_batch([2, 3], groups=[0, 1])
    batch.images = [{}, {"pixel_values": torch.zeros(1)}]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match='supports images only in one process; use strategy = "torch", or one rank'):
        forward(None, batch, frozenset(), torch.device("cpu"))
