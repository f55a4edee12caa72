"""The loss scale of float16 in checkpoints, with DeepSpeed's own scaler and without the rest of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contract.distributed import World
from rlhf_strategy_deepspeed import trainable
from rlhf_strategy_deepspeed.trainable import DeepSpeedTrainable

scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler", reason="needs deepspeed")

WINDOW = 4
"""steps without an overflow after which the scale grows"""


def dynamic() -> Any:
    """A scaler with the options of the strategy."""
    return scalers.DynamicLossScaler(2.0**16, WINDOW, 1.0, 1, False, raise_error_at_min_scale=False)


def role_with(scaler: Any) -> Any:
    """A role that has nothing but its scaler."""
    role: Any = object.__new__(DeepSpeedTrainable)
    role.ranks, role.shards, role.stage, role.engine, role._names = World(), None, 1, None, []
    role.steps_done, role.scaler = 0, scaler
    return role


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, and one rank."""
    monkeypatch.setattr(trainable, "rank_pieces", lambda *_: iter(()))
    monkeypatch.setattr(trainable, "read_states", lambda *_: None)
    monkeypatch.setattr(scalers.dist, "get_rank", lambda: 0)


@pytest.mark.parametrize("before", range(12))
def test_a_resumed_scale_takes_the_same_way_as_a_straight_one(before: int, tmp_path: Path) -> None:
    overflows = [True, False, False, True, *[False] * 9, True, *[False] * 10]
    straight = dynamic()
    for overflow in overflows[:before]:
        straight.update_scale(overflow)
    role_with(straight).save(str(tmp_path))
    resumed = dynamic()
    role_with(resumed).load(str(tmp_path))
    ways: list[list[float]] = []
    for scaler in (straight, resumed):
        ways.append([])
        for overflow in overflows[before:]:
            ways[-1].append(scaler.cur_scale)
            scaler.update_scale(overflow)
    assert ways[0] == ways[1]
    assert len(set(ways[0])) > 1, "it grew or fell"


def test_a_constant_scale_is_that_of_the_options(tmp_path: Path) -> None:
    role_with(dynamic()).save(str(tmp_path))
    constant = scalers.LossScaler(128)
    role_with(constant).load(str(tmp_path))
    assert constant.cur_scale == 128
    role_with(constant).save(str(tmp_path))
    found = dynamic()
    found.cur_scale = 2.0
    role_with(found).load(str(tmp_path))
    assert found.cur_scale == 2.0
