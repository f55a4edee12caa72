"""Options of one-pass optimizers reach their estimators, first iterates included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from head_runs import head_of, plain_pairs, train
from torch import nn

from rlhf_algos.one_pass import Direction, Omd, load_estimator
from rlhf_algos.one_pass.memoryless_step import MemorylessStep
from rlhf_algos.optimizer.mle import MLE
from rlhf_algos.optimizer.omd import OMD
from rlhf_algos.optimizer.omd_cg import OMDCG
from rlhf_algos.optimizer.omd_memoryless import OMDMemoryless
from rlhf_core import UsageError


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        (OMD(lr=0.5, damping=2.0, radius=3.0, updates="block"), {"eta": 0.5, "radius": 3.0, "block": True}),
        (OMDCG(lr=0.5, damping=2.0, radius=3.0), {"eta": 0.5, "radius": 3.0, "block": False, "steps": 16}),
        (OMDCG(damping=2.0, num_cg_steps=5, updates="block"), {"steps": 5, "block": True}),
        (MLE(damping=2.0, solver="lbfgs", refit_every=7), {"solver": "lbfgs", "every": 7}),
    ],
)
def test_options_are_those_of_the_estimator(provider: Any, expected: dict[str, Any]) -> None:
    theta_D = torch.tensor([1.0, 2.0, 3.0])
    estimator = provider.estimator(3, theta_D)
    assert {name: getattr(estimator, name) for name in expected} == expected
    assert torch.equal(estimator.theta_D, theta_D.double())
    v = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(estimator.curvature.apply(v), 2 * v)  # no pair yet: the damping alone
    assert not provider.estimator(3, None).theta_D.any()


def test_the_rank_is_that_of_the_memory() -> None:
    assert OMDCG(rank=2).estimator(5, None).curvature.rank == 2


def test_the_memoryless_options_are_those_of_its_direction() -> None:
    provider = OMDMemoryless(
        lr=0.3, damping=0.4, damping_strategy="cosine", damping_growth_rate=9.0, num_cg_steps=5, compat="released"
    )
    step = provider([("model.score.weight", nn.Parameter(torch.zeros(1, 3)))], 70)
    assert isinstance(step, MemorylessStep)
    assert step.how == Direction(0.4, "cosine", 9.0, 5, released=True)
    assert step.total == 70 and step.param_groups[0]["lr"] == 0.3


def test_a_run_may_begin_at_the_weights_of_the_head(tmp_path: Path) -> None:
    train(tmp_path / "first", {"use": "sgd", "lr": 0.5}, steps=2)
    start_D = head_of(tmp_path / "first").double()
    more = {"model": str(tmp_path / "first" / "model"), "batch_size": 12}
    optim = {"use": "omd", "updates": "block"}
    train(tmp_path / "head", {**optim, "start": "head"}, **more)
    train(tmp_path / "zero", optim, **more)
    z_TD = plain_pairs(tmp_path / "head")
    for name, theta_D in (("head", start_D), ("zero", None)):
        estimator = Omd(16, block=True, theta_D=theta_D)
        estimator.step(z_TD)
        torch.testing.assert_close(load_estimator(tmp_path / name).theta_D, estimator.theta_D, rtol=1e-4, atol=1e-6)
    assert float((head_of(tmp_path / "head") - head_of(tmp_path / "zero")).norm()) > 1e-3


def test_the_newest_checkpoint_of_a_run_has_its_estimator_or_the_one_that_is_named(tmp_path: Path) -> None:
    train(tmp_path / "run", {"use": "omd"}, save_every=1, keep=3)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [load_estimator(folder).t for folder in (tmp_path / "run", *checkpoints)] == [12, 4, 8, 12]
    train(tmp_path / "other", {"use": "adamw"}, steps=1)
    with pytest.raises(UsageError, match="contains 0 estimator states, not 1; name a run"):
        load_estimator(tmp_path / "other")
    shutil.copytree(checkpoints[0] / "roles" / "reward", checkpoints[0] / "roles" / "second")
    with pytest.raises(UsageError, match="contains 2 estimator states, not 1"):
        load_estimator(checkpoints[0])


def test_inner_products_of_long_vectors_are_added_up_in_float64() -> None:
    step = OMDMemoryless()([("model.score.weight", nn.Parameter(torch.zeros(1, 3)))], 1)
    assert isinstance(step, MemorylessStep)
    many = torch.cat([torch.full((1,), 2.0**24), torch.ones(1000)])  # float32 has no odd numbers above 2 ** 24
    assert step._dot(many, torch.ones(1001)) == 2.0**24 + 1000
