"""Estimators as optimizers of a reward model's head: their own numbers on any ranks, resumed, and loaded anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from head_runs import ROWS, head_of, options, plain_pairs, train, write_rows

from rlhf_algos.one_pass import Mle, Omd, OmdCg, OmdMemoryless
from rlhf_algos.one_pass.head_step import HeadStep
from rlhf_algos.one_pass.omd_memoryless import Direction
from rlhf_algos.one_pass.store import load_estimator
from rlhf_core import Run, UsageError, make_config
from rlhf_core.cli import main
from rlhf_core.models.module import RoleModule
from rlhf_core.testing import run_ranks

ESTIMATORS: dict[str, tuple[dict[str, Any], Any]] = {
    "omd": ({"use": "omd", "lr": 0.7}, lambda: Omd(16, eta=0.7)),
    "block": ({"use": "omd", "updates": "block", "radius": 0.05}, lambda: Omd(16, block=True, radius=0.05)),
    "omd_cg": ({"use": "omd_cg", "rank": 2, "num_cg_steps": 4}, lambda: OmdCg(16, rank=2, steps=4)),
    "mle": ({"use": "mle", "damping": 0.5}, lambda: Mle(16, damping=0.5)),
}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of the data by step, as estimators get them."""
    seen: list[list[int]] = []
    receive = HeadStep.receive

    def record(self: HeadStep, features_NH: torch.Tensor, row_N: torch.Tensor) -> None:
        seen.append(row_N[0::2].tolist())
        assert torch.equal(row_N[0::2], row_N[1::2])
        receive(self, features_NH, row_N)

    monkeypatch.setattr(HeadStep, "receive", record)
    return seen


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_head_is_that_of_the_estimator_on_features_of_plain_transformers(name: str, tmp_path: Path, order) -> None:
    optim, make = ESTIMATORS[name]
    train(tmp_path / "run", optim)
    assert sorted(row for rows in order for row in rows) == list(range(12)) and len(order) == 3  # one pass means one
    z_TD, estimator = plain_pairs(tmp_path / "run"), make()
    for rows in order:
        estimator.step(z_TD[rows])
    torch.testing.assert_close(head_of(tmp_path / "run").double(), estimator.theta_D, rtol=1e-4, atol=1e-6)
    stored = load_estimator(tmp_path / "run")
    torch.testing.assert_close(stored.theta_D, estimator.theta_D, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored.curvature.solve(z_TD), estimator.curvature.solve(z_TD), rtol=1e-4, atol=1e-6)
    assert stored.t == estimator.t and stored.kind == estimator.kind


def test_no_pair_comes_twice_in_a_pass_that_batches_do_not_divide(
    tmp_path: Path, order: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """12 pairs in batches of 5: two steps, and two pairs that no step takes; batches of 13 would take none at all."""
    with caplog.at_level("INFO"):
        train(tmp_path / "run", {"use": "omd"}, batch_size=5)
    seen = [row for rows in order for row in rows]
    assert len(order) == 2 and len(seen) == len(set(seen)) == 10
    assert "are 2 steps of 5; the last 2 rows do not fill a batch and are not used" in caplog.text
    with pytest.raises(UsageError, match="13 is more than the 12 rows, but this optimizer uses each row only once"):
        train(tmp_path / "none", {"use": "omd_memoryless"}, batch_size=13)


def test_the_memoryless_optimizer_is_algorithm_5_on_the_head(tmp_path: Path, order) -> None:
    train(tmp_path / "order", {"use": "omd"})  # the same data order serves every estimator
    optim = {"use": "omd_memoryless", "lr": 0.5, "damping_strategy": "square", "num_cg_steps": 2}
    run = Run(make_config(**options(tmp_path / "run", optim)))
    start_D = run_head(run)
    run.train()
    estimator = OmdMemoryless(16, total=3, eta=0.5, how=Direction(strategy="square", steps=2), theta_D=start_D)
    z_TD = plain_pairs(tmp_path / "run")
    for rows in order:
        estimator.step(z_TD[rows])
    moved_D = head_of(tmp_path / "run").double() - start_D
    torch.testing.assert_close(moved_D, estimator.theta_D - start_D, rtol=1e-3, atol=1e-6)


def run_head(run: Run) -> torch.Tensor:
    """Return the head with which a run would begin."""
    from rlhf_core.models.build import build_module

    module = build_module(run.plan.roles["reward"], seed=run.config.seed)
    return module.model.score.weight.detach()[0].double()


def test_without_products_the_memoryless_step_is_sgd(tmp_path: Path) -> None:
    train(tmp_path / "a", {"use": "omd_memoryless", "lr": 0.5, "use_hvp": False})
    train(tmp_path / "b", {"use": "sgd", "lr": 0.5, "schedule": "constant", "max_grad_norm": 0.0}, epochs=1.0)
    torch.testing.assert_close(head_of(tmp_path / "a"), head_of(tmp_path / "b"), rtol=0, atol=1e-8)


def test_the_average_of_iterates_is_what_the_head_has_if_asked(tmp_path: Path) -> None:
    train(tmp_path / "run", {"use": "omd", "average": True})
    stored = load_estimator(tmp_path / "run")
    torch.testing.assert_close(head_of(tmp_path / "run").double(), stored.average_D, rtol=1e-6, atol=1e-8)
    assert float((stored.average_D - stored.theta_D).norm()) > 1e-3


@pytest.mark.parametrize("name", ["omd", "mle", pytest.param("omd_cg", marks=pytest.mark.slow)])
def test_neither_micro_batches_nor_two_ranks_change_the_head(name: str, tmp_path: Path) -> None:
    optim, _ = ESTIMATORS[name]
    train(tmp_path / "one", optim)
    train(tmp_path / "micro", optim, micro_tokens=1)
    torch.testing.assert_close(head_of(tmp_path / "micro"), head_of(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    flags = [f"--reward.optim.{key.replace('_', '-')}={value}" for key, value in optim.items()]
    data = ["--data", "json", "--data.path", str(write_rows(tmp_path / "two")), "--data.encoding.template", "raw"]
    size = ["--model", "tiny:hidden=16,layers=1", "--batch-size", "4", "--reward.freeze", "body"]
    ranks = run_ranks(2, main, ["reward", *data, *size, *flags, "--output", str(tmp_path / "two")])
    assert all(rank.code == 0 for rank in ranks), ranks
    torch.testing.assert_close(head_of(tmp_path / "two"), head_of(tmp_path / "one"), rtol=1e-5, atol=1e-7)


def test_two_ranks_ask_for_the_pairs_that_one_asks_for(tmp_path: Path) -> None:
    """The pool is the batch of both ranks: labels, the curvature of asked pairs and the head are those of one process."""
    more = {"algorithm": "active_reward", "advantage": {"use": "ask", "share": 0.5}, "save_every": 3}
    train(tmp_path / "one", {"use": "omd"}, **more)
    data = ["--data", "json", "--data.path", str(write_rows(tmp_path / "two")), "--data.encoding.template", "raw"]
    size = ["--model", "tiny:hidden=16,layers=1", "--batch-size", "4", "--reward.freeze", "body", "--save-every", "3"]
    flags = ["--reward.optim.use", "omd", "--advantage.share", "0.5", "--output", str(tmp_path / "two")]
    ranks = run_ranks(2, main, ["active_reward", *data, *size, *flags])
    assert all(rank.code == 0 for rank in ranks), ranks
    torch.testing.assert_close(head_of(tmp_path / "two"), head_of(tmp_path / "one"), rtol=1e-5, atol=1e-7)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [line["ask/labels"] for line in two] == [line["ask/labels"] for line in one] == [2, 4, 6]
    assert [line["ask/score"] for line in two] == pytest.approx([line["ask/score"] for line in one], rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_resumed_run_has_the_state_of_a_straight_one_to_the_bit(name: str, tmp_path: Path) -> None:
    optim, _ = ESTIMATORS[name]
    straight = train(tmp_path / "straight", optim, steps=3)
    train(tmp_path / "stopped", optim, steps=2)
    resumed = Run(make_config(**options(tmp_path / "stopped", optim, steps=3, resume=True)))
    resumed.train()
    assert torch.equal(head_of(tmp_path / "straight"), head_of(tmp_path / "stopped"))
    one, other = (load_estimator(run.config.output) for run in (straight, resumed))
    assert one.t == other.t and torch.equal(one.theta_D, other.theta_D) and torch.equal(one.average_D, other.average_D)
    v = torch.ones(16, dtype=torch.float64)
    assert torch.equal(one.curvature.solve(v), other.curvature.solve(v))


def test_the_state_continues_in_a_later_run(tmp_path: Path) -> None:
    first = train(tmp_path / "first", {"use": "omd"})
    train(tmp_path / "second", {"use": "omd", "state": str(first.config.output)}, data=second_data(tmp_path / "second"))
    before, after = load_estimator(first.config.output), load_estimator(tmp_path / "second")
    assert after.t == 2 * before.t
    estimator = load_estimator(first.config.output)
    z_TD = plain_pairs(tmp_path / "second")
    v = torch.ones(16, dtype=torch.float64)
    assert float(after.curvature.apply(v) @ v) > float(estimator.curvature.apply(v) @ v)
    assert float(after.curvature.norm_inverse(z_TD).sum()) < float(before.curvature.norm_inverse(z_TD).sum())


def second_data(output: Path) -> dict[str, Any]:
    """Return a reader of the same pairs, in another file."""
    return {"use": "json", "path": str(write_rows(output)), "encoding": {"template": "raw"}}


def test_one_epoch_is_the_default_and_given_steps_take_its_place(tmp_path: Path) -> None:
    for use, more, epochs, steps in [
        ("omd", {}, 1.0, None),
        ("omd", {"steps": 7}, 0.0, 7),
        ("omd_memoryless", {"epochs": 2.0}, 2.0, None),
        ("sgd", {}, 0.0, 100),
    ]:
        config = make_config(**options(tmp_path / "x", {"use": use}, **more))
        assert config.epochs == epochs and (steps is None or config.steps == steps)


def test_each_row_goes_through_the_body_once_whatever_the_number_of_runs(tmp_path: Path, monkeypatch) -> None:
    rows: list[int] = []
    read = RoleModule._read

    def count(self: RoleModule, inputs: Any, routed: bool = False) -> Any:
        rows.append(len(inputs.ids_NS))
        return read(self, inputs, routed)

    monkeypatch.setattr(RoleModule, "_read", count)
    shared = {"reward": {"features": str(tmp_path / "features")}}
    train(tmp_path / "one", {"use": "omd"}, **shared)
    assert sum(rows) == 24
    train(tmp_path / "two", {"use": "adamw"}, epochs=3.0, **shared)
    train(tmp_path / "three", {"use": "omd"}, **shared)
    assert sum(rows) == 24
    assert torch.equal(head_of(tmp_path / "one"), head_of(tmp_path / "three"))
    train(tmp_path / "other", {"use": "omd"}, **shared, model="tiny:hidden=16,layers=2")
    assert sum(rows) == 48  # another body
    (tmp_path / "features" / "features.sqlite").write_text("no database" * 1000)
    with pytest.raises(UsageError, match="cannot store features in .* remove the damaged features.sqlite"):
        train(tmp_path / "four", {"use": "omd"}, **shared)


@pytest.mark.parametrize(
    ("optim", "more", "message"),
    [
        ({"use": "omd"}, {"reward": {"freeze": []}}, "trains only the head of a reward model, but .*freeze"),
        ({"use": "omd"}, {"loss": {"use": "bradley_terry", "center": 0.1}}, "without margin and center"),
        ({"use": "omd", "damping": 0.0}, {}, "damping.* must be above 0, not 0.0: the curvature would be singular"),
        ({"use": "omd", "state": "nowhere"}, {}, "nowhere has no valid checkpoint"),
        ({"use": "mle", "damping": -1.0}, {}, "damping.* must be above 0"),
        ({"use": "omd_cg", "rank": 0}, {}, "rank.* must be at least 1"),
        ({"use": "sgd", "nesterov": True}, {}, "nesterov.* needs momentum above 0"),
        ({"use": "adamw"}, {"reward": {"freeze": [], "features": "x"}}, "but the body is trained; .*freeze"),
    ],
)
def test_mistakes_end_in_one_line(optim: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as error:
        train(tmp_path / "run", optim, **more)
    assert "\n" not in str(error.value)


def test_a_state_of_another_dimension_is_refused(tmp_path: Path) -> None:
    first = train(tmp_path / "first", {"use": "omd"})
    with pytest.raises(UsageError, match="stored state of omd has 16 features, but this reward head has 32"):
        train(tmp_path / "next", {"use": "omd", "state": str(first.config.output)}, model="tiny:hidden=32,layers=1")
    with pytest.raises(UsageError, match="the stored state is of 'omd', but this estimator is 'mle'"):
        train(tmp_path / "mle", {"use": "mle", "state": str(first.config.output)})


def test_pairs_of_equal_features_are_logged_once_and_teach_nothing(tmp_path: Path, caplog) -> None:
    rows = [*ROWS[:6], {"prompt": "same", "chosen": "answer", "rejected": "answer"}, *ROWS[6:11]]
    path = write_rows(tmp_path / "data", rows)
    data = {"use": "json", "path": str(path), "encoding": {"template": "raw"}}
    train(tmp_path / "run", {"use": "omd"}, data=data)
    lines = [record.message for record in caplog.records if "equal features" in record.message]
    assert len(lines) == 1 and "1 of 4 pairs" in lines[0] and "row 7 of the data" in lines[0]


def test_features_that_are_not_finite_stop_the_run_in_one_line(tmp_path: Path, monkeypatch) -> None:
    read = RoleModule._read

    def damage(self: RoleModule, inputs: Any, routed: bool = False) -> Any:
        states, *rest = read(self, inputs, routed)
        return (states * float("nan"), *rest)

    monkeypatch.setattr(RoleModule, "_read", damage)
    with pytest.raises(Exception, match="not finite|nan") as error:
        train(tmp_path / "run", {"use": "omd"})
    assert "\n" not in str(error.value)


def test_metrics_report_eta_as_the_learning_rate(tmp_path: Path) -> None:
    train(tmp_path / "run", {"use": "omd", "lr": 2.0, "schedule": "linear"})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr/reward"] for line in lines] == pytest.approx([2.0, 4 / 3, 2 / 3])
