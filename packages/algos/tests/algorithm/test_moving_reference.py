"""The reference of a preset stays as it is by default, and follows the actor if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Registry, Run, RunView, hookimpl, make_config

SMALL: dict[str, Any] = {
    "model": "tiny:hidden=16,layers=1",
    "batch_size": 2,
    "steps": 2,
    "reward": "length",
    "sampling": {"n": 2, "max_new_tokens": 4},
    "actor": {"optim": {"lr": 1e-2}},
    "algorithm": {"use": "grpo", "kl": {"coef": 0.1}},
}


@pytest.mark.parametrize(("track", "moves"), [({}, False), ({"of": "actor", "every": 1}, True)])
def test_the_reference_of_grpo(tmp_path: Path, track: dict[str, Any], moves: bool) -> None:
    """KL is 0 at the start of each step with a reference that has just followed, and above with one that stays."""
    equal: list[bool] = []

    class Watcher:
        @hookimpl
        def rlhf_step_end(self, run: RunView) -> None:
            actor = {name: tensor.clone() for name, tensor in run.roles["actor"].weights()}
            equal.append(all(torch.equal(actor[name], tensor) for name, tensor in run.roles["reference"].weights()))

    registry = Registry()
    registry.register(Watcher(), "watcher")
    options = {**SMALL, "reference": {"track": track}, "output": str(tmp_path)}
    run = Run(make_config(options.pop("algorithm"), registry, **options), registry)
    metrics = run.train().metrics
    assert equal == [moves, moves]
    assert (metrics["kl/mean"] == pytest.approx(0, abs=1e-7)) is moves
    assert ("staleness/reference" in metrics) is moves
