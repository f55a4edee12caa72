"""Terms that take part in some steps only: what is sampled, trained, counted, scheduled and resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Batch
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import TrainedOptions
from rlhf_core.contract.providers import Algorithm
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.loop import collect
from rlhf_core.run.iteration import Iteration
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyAlgorithm, TinyLoss
from rlhf_core.training.planner import make_plan

FALLING = AdamW(lr=1e-3, schedule="linear")


@dataclass(frozen=True)
class Pair(Algorithm):
    """A scout that learns in every step, and an actor that learns from both in every `every`-th."""

    every: int = 3

    defaults: ClassVar[Mapping[str, str]] = TinyAlgorithm.defaults
    roles: ClassVar[Mapping[str, Any]] = dict.fromkeys(("actor", "scout"), TrainedOptions(optim=FALLING))

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        credit = TinyAdvantage()
        return (
            Term("actor", "actor", TinyLoss(), credit, every=self.every),
            Term("actor", "scout", TinyLoss(), credit, every=self.every),
            Term("scout", "scout", TinyLoss(), credit),
        )


def run_of(output: Path, every: int = 3, **options: Any) -> Run:
    small: dict[str, Any] = {"model": "tiny:hidden=16,layers=1", "batch_size": 2, "steps": 7, "output": str(output)}
    sampling = {"n": 2, "max_new_tokens": 4}
    return Run(make_config(Pair(every), sampling=sampling, **(small | options)))


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_planned_from_the_terms_whose_turn_it_is(tmp_path: Path) -> None:
    plan = run_of(tmp_path).plan
    assert plan.for_step(3) is plan.for_step(6) is plan
    resting = plan.for_step(4)
    assert (resting.sources, resting.trained_roles, list(resting.credits)) == (("scout",), ("scout",), ["scout#1"])
    assert [plan.credits[key].every for key in plan.credits] == [3, 3, 1], "a credit has one cadence"
    assert [plan.optimiser_steps(role) for role in ("actor", "scout")] == [2, 7]
    twice = make_plan(make_config(Pair(3), model="tiny", steps=7, update_epochs=2, minibatches=3, sampling={"n": 2}))
    assert twice.optimiser_steps("actor") == 12


def test_with_a_cadence_of_one_nothing_changes(tmp_path: Path) -> None:
    plan = run_of(tmp_path, every=1).plan
    assert plan.for_step(1) is plan
    assert list(plan.credits) == ["actor", "scout"], "terms of one source and credit share it"


def test_resting_roles_are_neither_sampled_nor_moved_and_keep_their_own_schedule(tmp_path: Path) -> None:
    run_of(tmp_path / "run").train()
    found = rows(tmp_path / "run")
    assert [row["samples"] for row in found] == [4, 4, 8, 4, 4, 8, 4]
    assert [step for step, row in enumerate(found, 1) if "loss/actor" in row] == [3, 6]
    assert all("loss/scout" in row for row in found)
    assert [row["lr/actor"] for row in found if "lr/actor" in row] == [1e-3, 5e-4], "linear over its two updates"
    assert found[6]["lr/scout"] == pytest.approx(1e-3 / 7)
    with run_of(tmp_path / "other").open() as run:
        assert set(next(run.iterations(collect)).batches) == {"scout"}


def test_a_killed_run_resumes_in_the_middle_of_a_cadence(tmp_path: Path) -> None:
    run_of(tmp_path / "whole").train()
    killed = run_of(tmp_path / "parts", save_every=4)
    finish = killed.finish

    def die_after_step_5(iteration: Iteration, credited: Mapping[str, Batch]) -> None:
        finish(iteration, credited)
        if iteration.step == 5:  # past the checkpoint of step 4, between two updates of the actor
            raise KeyboardInterrupt

    killed.finish = die_after_step_5  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    run_of(tmp_path / "parts", resume=True, save_every=4).train()
    timeless = lambda row: {
        name: value for name, value in row.items() if not name.startswith(("time/", "speed/", "memory/"))
    }
    assert [timeless(row) for row in rows(tmp_path / "parts")] == [timeless(row) for row in rows(tmp_path / "whole")]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
