"""Ranks of the tests of exports: a model that stage 3 has sharded, written in small files, and how much was whole at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.contract.options import TrainedOptions
from rlhf_core.launcher.local import join_world
from rlhf_core.testing import tiny_run
from rlhf_core.training.local_role import LocalRole

BUCKET = 5000
"""Elements that are gathered at once."""
SHARD = "40KB"
MODEL = "tiny:layers=4"


def export(folder: str) -> None:
    """Write a model under stage 3, and note its weights and the most bytes that were whole at once on any rank."""
    from rlhf_strategy_deepspeed.strategy import DeepSpeed

    torch.set_num_threads(1)
    world = join_world()
    strategy = DeepSpeed(stage=3, bucket=BUCKET, persist=1)
    plan = tiny_run("unused", strategy=strategy, actor=TrainedOptions(model=MODEL, ema=0.5)).plan
    role = LocalRole(replace(plan, config=replace(plan.config, export_shard=SHARD)), "actor")
    expected = {name: tensor.clone() for name, tensor in role.weights()}
    alive: dict[int, int] = {}
    seen = [0]
    given = role.trainable.weights

    def watched() -> Iterator[tuple[str, Tensor]]:
        for number, (name, tensor) in enumerate(given()):
            alive[number] = tensor.numel() * tensor.element_size()
            weakref.finalize(tensor, alive.pop, number)
            gathered = sum(each.numel() * each.element_size() for each in role.module.parameters())
            seen.append(sum(alive.values()) + gathered)
            yield name, tensor
            del tensor

    role.trainable.weights = watched  # type: ignore[method-assign]
    role.export(f"{folder}/model")
    found: Any = {"expected": expected, "most": world.gather(max(seen))}
    if world.rank == 0:
        torch.save(found, Path(folder, "found.pt"))
