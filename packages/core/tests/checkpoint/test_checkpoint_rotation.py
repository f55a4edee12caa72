"""Rotation of checkpoints: the newest, the best, and as many others as number and size allow stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.checkpoint.own_files import new_files, read_own_files
from rlhf_core.checkpoint.rotation import Rotation, check_metric, read_best, which_is_better
from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_run

MODEL = "tiny:hidden=16,layers=1"


def checkpoints(output: Path, values: Mapping[int, float | None], size: int = 1000) -> list[str]:
    """Write checkpoints of some steps with a metric `score` each; their names."""
    own = read_own_files(output) or new_files()
    own.write(output)
    for step, value in values.items():
        folder = output / "checkpoints" / f"step-{step}"
        (folder / "roles").mkdir(parents=True)
        state = json.dumps({"metrics": {} if value is None else {"score": value}})
        (folder / "state.json").write_text(state)
        own.write(folder)
        (folder / "roles" / "weights").write_bytes(bytes(size - len(state) - (folder / "run.json").stat().st_size))
    return left(output)


def left(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def best(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "checkpoints" / "best.json").read_text())
    return found


def test_the_newest_stay_by_the_number_of_their_step_not_their_name(tmp_path: Path) -> None:
    checkpoints(tmp_path, {8: None, 9: None, 10: None, 11: None})
    Rotation(keep=3)(tmp_path)
    assert left(tmp_path) == ["step-10", "step-11", "step-9"]


@pytest.mark.parametrize(
    ("limit", "kept"), [(3000, 3), (2999, 2), (1000, 1), (1, 1), (0, 4)], ids=lambda value: str(value)
)
def test_as_many_stay_as_fit_and_the_newest_always(limit: int, kept: int, tmp_path: Path) -> None:
    checkpoints(tmp_path, dict.fromkeys(range(1, 6)))
    Rotation(keep=4, gigabytes=limit / 1e9)(tmp_path)
    assert left(tmp_path) == [f"step-{step}" for step in range(6 - kept, 6)]


def test_low_losses_are_good_unless_somebody_says_otherwise() -> None:
    low = ["eval/heldout/loss", "eval/heldout/perplexity", "loss/actor", "actor/nll"]
    assert [which_is_better(name, "auto") for name in (*low, "eval/heldout/reward")] == ["min"] * 4 + ["max"]
    assert which_is_better("eval/heldout/loss", "max") == "max"


@pytest.mark.parametrize(("mode", "step", "value"), [("max", 2, 0.9), ("min", 3, 0.1)])
def test_the_best_is_marked_and_stays_beside_the_newest(mode: Any, step: int, value: float, tmp_path: Path) -> None:
    checkpoints(tmp_path, {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.4, 5: None, 6: float("nan")})
    Rotation(keep=2, metric="score", mode=mode)(tmp_path)
    assert left(tmp_path) == ["best.json", f"step-{step}", "step-5", "step-6"]
    assert best(tmp_path) == {"checkpoint": f"step-{step}", "metric": "score", "mode": mode, "value": value}


def test_a_better_one_takes_its_place_and_of_equals_the_newest(tmp_path: Path) -> None:
    checkpoints(tmp_path, {1: 0.5, 2: 0.1})
    rotation = Rotation(keep=1, metric="score")
    rotation(tmp_path)
    assert left(tmp_path) == ["best.json", "step-1", "step-2"]
    checkpoints(tmp_path, {3: 0.5})
    rotation(tmp_path)
    assert left(tmp_path) == ["best.json", "step-3"]


def test_the_best_counts_towards_the_size_once_and_stays_even_where_it_does_not_fit(tmp_path: Path) -> None:
    checkpoints(tmp_path, {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3})
    Rotation(keep=3, gigabytes=3000 / 1e9, metric="score")(tmp_path)
    assert left(tmp_path) == ["best.json", "step-1", "step-3", "step-4"]
    Rotation(keep=3, gigabytes=1 / 1e9, metric="score")(tmp_path)
    assert left(tmp_path) == ["best.json", "step-1", "step-4"]
    checkpoints(tmp_path, {5: 1.0})
    Rotation(keep=3, gigabytes=2000 / 1e9, metric="score")(tmp_path)
    assert left(tmp_path) == ["best.json", "step-4", "step-5"]


def test_what_was_measured_after_a_checkpoint_was_written_counts_too(tmp_path: Path) -> None:
    checkpoints(tmp_path, {1: 0.5, 2: None})
    Rotation(keep=1, metric="score", measured={2: 0.6})(tmp_path)
    assert best(tmp_path)["checkpoint"] == "step-2"


def test_a_checkpoint_with_a_damaged_state_is_not_the_best_and_a_marker_of_nothing_goes(tmp_path: Path) -> None:
    checkpoints(tmp_path, {1: 0.5, 2: 0.1})
    (tmp_path / "checkpoints" / "step-1" / "state.json").write_text("{")
    Rotation(keep=1, metric="score")(tmp_path)
    assert left(tmp_path) == ["best.json", "step-2"]
    Rotation(keep=1)(tmp_path)
    assert left(tmp_path) == ["step-2"]


@dataclass(frozen=True)
class Score(Evaluator):
    """A number that is known beforehand, by step."""

    values: tuple[float, ...] = ()
    """one a step, from before the first"""

    def __call__(self, run: Run) -> dict[str, float]:
        return {"score": self.values[run.step]}


@pytest.mark.parametrize("save_async", [False, True], ids=["waiting", "beside"])
@pytest.mark.parametrize(
    ("values", "every", "kept"),
    [
        pytest.param((9.0, 1.0, 3.0, 2.0, 0.0), 1, ["step-2", "step-4"], id="an earlier one"),
        pytest.param((9.0, 1.0, 3.0, 2.0, 4.0), 1, ["step-4"], id="the last one"),
        pytest.param((9.0, 1.0, 3.0, 2.0, 4.0), 3, ["step-4"], id="found out after it was saved"),
        pytest.param((9.0, 1.0, 5.0, 2.0, 1.0), 3, ["step-3", "step-4"], id="of those that were measured"),
    ],
)
def test_a_run_keeps_the_checkpoint_that_did_best(
    save_async: bool, values: tuple[float, ...], every: int, kept: list[str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"keep": 1, "keep_best": "eval/score", "eval_every": every, "evaluator": [Score(values)]}
    tiny_run(tmp_path, model=MODEL, steps=4, save_every=1, save_async=save_async, **options).train()
    assert left(tmp_path) == ["best.json", *kept]
    assert best(tmp_path)["checkpoint"] == kept[0]
    assert best(tmp_path)["value"] == values[int(kept[0][-1])]


def test_a_metric_that_nobody_measures_ends_the_run_with_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keep_best=… reward/meen: no such metric \(did you mean 'reward/mean'\?\)"):
        tiny_run(tmp_path, model=MODEL, steps=9, keep_best="reward/meen").train()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("metrics", [{"skipped/actor": 1.0}, {"loss/actor": 0.1, "reward/mean": 0.5}])
def test_a_step_that_could_not_measure_it_is_no_reason_to_end(metrics: dict[str, float]) -> None:
    """Without an update nothing is known of the step, and not every step has rows of every datasource."""
    check_metric("reward/mean/maths", ["actor"], metrics, [])
    with pytest.raises(UsageError, match="no such metric"):
        check_metric("reward/mean/maths", ["actor"], {"loss/actor": 0.1}, [])


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"checkpoint": "step-9"}', b'{"checkpoint": "../../mine"}'])
def test_a_damaged_marker_of_the_best_is_named_and_never_followed(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = new_files()
    own.write(tmp_path)
    (tmp_path / "checkpoints/step-1").mkdir(parents=True)
    own.write(tmp_path / "checkpoints/step-1")
    marker = tmp_path / "checkpoints/best.json"
    marker.write_text('{"checkpoint": "step-1"}')
    assert read_best(tmp_path) == tmp_path / "checkpoints/step-1"
    marker.write_bytes(content)
    assert read_best(tmp_path) is None
    assert "best.json is damaged; the model of the best checkpoint is not written" in capsys.readouterr().err
