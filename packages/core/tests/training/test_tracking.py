"""Roles that follow another: copies and averages at the right steps, after a resume and on several ranks too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chase import Chase

from rlhf_core import Registry, Run, RunView, Tracking, TrackingOptions, UsageError, hookimpl, make_config
from rlhf_core.cli import main
from rlhf_core.testing import run_ranks
from rlhf_core.training.local_role import LocalRole
from rlhf_core.util.tensor_tree import read_tree

MODEL = "tiny:hidden=16,layers=1"
Weights = dict[str, torch.Tensor]


def run_of(output: Path, registry: Registry | None = None, **options: Any) -> Run:
    small: dict[str, Any] = {"model": MODEL, "batch_size": 2, "steps": 5, "output": str(output)}
    return Run(make_config(Chase(), **(small | options)), registry)


def weights_of(run: RunView, role: str) -> Weights:
    return {name: tensor.clone() for name, tensor in run.roles[role].weights()}


def rows(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time", "speed", "memory"))} for line in lines
    ]


class Watcher:
    """The weights of the three roles, at the start and after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Weights]] = []

    def look(self, run: RunView) -> None:
        self.seen.append({role: weights_of(run, role) for role in ("actor", "opponent", "target")})

    @hookimpl
    def rlhf_run_start(self, run: RunView) -> None:
        self.look(run)

    @hookimpl
    def rlhf_step_end(self, run: RunView) -> None:
        self.look(run)


def watch(output: Path, **options: Any) -> list[dict[str, Weights]]:
    """The weights of the actor, its opponent and its target before the first step and after each."""
    watcher, registry = Watcher(), Registry()
    registry.register(watcher, "watcher")
    run_of(output, registry, **options).train()
    return watcher.seen


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Weights]]]:
    output = tmp_path_factory.mktemp("straight") / "run"
    return output, watch(output, save_every=3, keep=9)


def test_a_copy_has_the_weights_of_the_last_multiple_of_its_steps(
    straight: tuple[Path, list[dict[str, Weights]]],
) -> None:
    _, seen = straight
    for step, weights in enumerate(seen):
        source = seen[step // 2 * 2]["actor"]
        assert all(torch.equal(weights["opponent"][name], source[name]) for name in source), f"after step {step}"
    assert any(not torch.equal(seen[1]["actor"][name], seen[1]["opponent"][name]) for name in seen[1]["actor"])


def test_an_average_is_that_of_the_formula_in_float64(straight: tuple[Path, list[dict[str, Weights]]]) -> None:
    _, seen = straight
    expected = {name: tensor.double() for name, tensor in seen[0]["actor"].items()}
    for weights in seen[1:]:
        expected = {name: 0.75 * old + 0.25 * weights["actor"][name].double() for name, old in expected.items()}
        for name, tensor in weights["target"].items():
            torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=0)


def test_staleness_counts_the_steps_that_a_role_is_behind(straight: tuple[Path, list[dict[str, Weights]]]) -> None:
    output, _ = straight
    assert [row["staleness/opponent"] for row in rows(output)] == [1, 0, 1, 0, 1]
    assert [row["staleness/target"] for row in rows(output)] == [0] * 5
    assert [row["rollout/staleness"] for row in rows(output)] == [0] * 5, "samples are the opponent's, as it is"


@pytest.mark.parametrize("options", [{}, {"save_async": True}])
def test_a_resumed_run_has_the_numbers_of_a_straight_one(
    straight: tuple[Path, list[dict[str, Weights]]], tmp_path: Path, options: dict[str, Any]
) -> None:
    """It stops after step 3, when the opponent is a step old: its weights are no role's any more."""
    output, seen = straight
    run_of(tmp_path / "run", steps=3, **options).train()
    resumed = watch(tmp_path / "run", resume=True, **options)
    assert rows(tmp_path / "run") == rows(output)
    for role in ("actor", "opponent", "target"):
        assert all(torch.equal(resumed[0][role][name], tensor) for name, tensor in seen[3][role].items()), role
        assert all(torch.equal(resumed[-1][role][name], tensor) for name, tensor in seen[5][role].items()), role


def test_two_ranks_have_the_numbers_of_one(straight: tuple[Path, list[dict[str, Weights]]], tmp_path: Path) -> None:
    output, seen = straight
    words = ["chase:Chase", "--model", MODEL, "--batch-size", "2", "--steps", "5", "--output", str(tmp_path / "run")]
    done = run_ranks(2, main, words)
    assert not any(rank.code for rank in done), done[-1].stderr[-3000:]
    for one, two in zip(rows(output), rows(tmp_path / "run"), strict=True):
        names = [name for name in one if name != "padding"]
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-5)
    saved = tmp_path / "run" / "checkpoints" / "step-5" / "roles"
    for role in ("opponent", "target"):
        for name, tensor in read_tree(saved / role / "weights.safetensors").items():
            torch.testing.assert_close(tensor, seen[5][role][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opponent": {"track": {"of": "poet"}}}, "no term trains a role 'poet' in this run; name one of actor"),
        (
            {"target": {"dtype": "bfloat16"}},
            "the target averages the weights of the actor, but bfloat16 loses small changes",
        ),
        ({"opponent": {"quantize": "nf4"}}, "the opponent tracks the actor, but 4-bit weights cannot be updated"),
        ({"opponent": {"track": {"every": 0}}}, "every must be at least 1, not 0"),
        ({"opponent": {"track": {"decay": 1.0}}}, "decay must be below 1, not 1.0"),
    ],
)
def test_tracking_that_cannot_work_is_refused_before_anything_starts(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run_of(tmp_path, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "tiny:hidden=32,layers=1",
            r"model.embed_tokens.weight has the shape .*, 16. there and .*, 32. here; give both",
        ),
        ("tiny:hidden=16,layers=2", r"model.layers.1\..* is missing there; give both"),
    ],
)
def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path: Path, model: str, message: str) -> None:
    plan = run_of(tmp_path, opponent={"model": model}).plan
    actor, opponent = LocalRole(plan, "actor"), LocalRole(plan, "opponent")
    with pytest.raises(UsageError, match=f"the opponent cannot take the weights of another role: {message}"):
        opponent.load_weights(actor.weights())


def test_a_role_with_a_model_of_its_own_begins_with_it(tmp_path: Path) -> None:
    """Else it begins as the role it tracks, whose model it has."""
    assert (
        run_of(tmp_path, actor={"model": "tiny:hidden=16,layers=2"}).plan.roles["opponent"].options.model.endswith("2")
    )
    run = run_of(tmp_path, opponent={"model": f"{MODEL},seed=1"})
    with run.place():
        actor, opponent = weights_of(run, "actor"), weights_of(run, "opponent")
        assert not torch.equal(actor["model.embed_tokens.weight"], opponent["model.embed_tokens.weight"])


def test_tracking_is_off_by_default() -> None:
    assert TrackingOptions().track == Tracking() and not Tracking().of
