"""On a GPU, roles that take turns hold no more of it than the budget says, and give it back when they sleep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Run, make_config
from rlhf_core.contract.options import Sampling
from rlhf_core.launcher import sharing
from rlhf_core.launcher.local import Local
from rlhf_core.launcher.residents import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MODEL = "tiny:hidden=256,layers=4"


def config(folder: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"model": MODEL, "reward": "length", "batch_size": 4, "steps": 2, "minibatches": 1}
    given |= {
        "sampling": Sampling(n=2, max_new_tokens=8),
        "deterministic": True,
        "output": str(folder),
        "report": False,
    }
    return make_config("ppo", **given | changes)


def test_turns_bound_what_the_allocator_counts_and_change_no_number(tmp_path: Path) -> None:
    pytest.importorskip("rlhf_algos")
    apart = Run(config(tmp_path / "all"))
    apart.train()
    needs = sharing.expected_memory(apart.plan, GIB, 1).values()
    budget = max(each.resident + max(each.training, each.inference, each.cache) for each in needs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shared = Run(config(tmp_path / "turns", launcher=Local(share_memory="on", share_gib=1.05 * budget / GIB)))
    shared.train()
    assert torch.cuda.max_memory_allocated() - before < 1.3 * budget, "forecasts are not exact"
    rows = [
        [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
        for run in (apart, shared)
    ]
    for stayed, woken in zip(*rows, strict=True):
        assert woken["loss/actor"] == stayed["loss/actor"]
        assert woken["reward/mean"] == stayed["reward/mean"]
        assert woken["sleep/critic/gib"] > 0


def test_a_role_that_sleeps_leaves_nothing_on_the_device(tmp_path: Path) -> None:
    from rlhf_core.training.local_role import LocalRole

    plan = Run(config(tmp_path / "unused")).plan
    before = torch.cuda.memory_allocated()
    role = LocalRole(plan, "actor")
    held = torch.cuda.memory_allocated() - before
    assert role.sleep() == held > 0
    assert torch.cuda.memory_allocated() == before
    assert role.wake() == held
