"""The report of saved evaluations: tables at any threshold, methods over seeds, and the figure's curves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_core import DataError, OptionError, UsageError
from rlhf_core.cli.app import main
from rlhf_eval_gcg.analysis.drawing import loss_by_flops, success_by_threshold
from rlhf_eval_gcg.analysis.read import group_evaluations, read_evaluations
from rlhf_eval_gcg.analysis.report import GCGReport, report_rows


def leave(
    folder: Path, bad: list[int], n: int = 4, step: int = 0, threshold: float | None = 0.5, loss: float = 1.0
) -> Path:
    """Write an evaluation in which so many of n answers to each attacked goal are bad, and none to clean ones."""
    path = folder / "gcg" / f"step-{step}"
    path.mkdir(parents=True)
    attacks = [
        {"seed": 0, "goal": f"g{goal}", "losses": [3.0, loss], "flops": [1e6, 2e6], "loss": loss, "initial_loss": 4.0,
         "matched": False}
        for goal in range(len(bad))
    ]  # fmt: skip
    answers: list[dict[str, Any]] = []
    for goal, count in enumerate(bad):
        answers += [{"goal": goal, "seed": None, "attacked": False, "reward": 1.0} for _ in range(n)]
        answers += [{"goal": goal, "seed": 0, "attacked": True, "reward": float(k >= count)} for k in range(n)]
    for name, rows in (("attacks.jsonl", attacks), ("answers.jsonl", answers)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (path / "settings.json").write_text(json.dumps({"threshold": threshold}), encoding="utf-8")
    return folder


def test_a_table_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = leave(tmp_path / "before", [4, 2, 0]), leave(tmp_path / "after", [1, 0, 0], loss=2.0)
    stem = tmp_path / "tables" / "report"
    assert main(["gcg-report", str(before), "--compare", str(after), "--output", str(stem), "--formats"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| model | step | threshold | loss at start | loss |")
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ["before", "after"]
    with stem.with_suffix(".csv").open(encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert float(first["attacked"]) == pytest.approx(0.5)
    assert float(first["attacked_any"]) == pytest.approx(2 / 3)
    assert float(second["attacked"]) == pytest.approx(1 / 12)
    assert float(second["difference"]) == pytest.approx(1 / 12 - 0.5)
    assert (float(first["loss"]), float(second["loss"])) == (1.0, 2.0)
    assert float(first["clean_any"]) == 0.0


def test_runs_that_differ_in_their_seed_are_one_method(tmp_path: Path) -> None:
    folders = [leave(tmp_path / f"rloo-seed{k}", [k, 0]) for k in range(3)]
    groups = group_evaluations(each for folder in folders for each in read_evaluations(folder))
    assert [(group.name, len(group.evaluations)) for group in groups] == [("rloo", 3)]
    (row,) = report_rows(groups, ())
    assert (row["runs"], row["seeds"], row["goals"]) == (3, 3, 2)
    assert row["attacked"].value == pytest.approx((0 + 1 + 2) / 4 / 6)


def test_any_threshold_and_any_k_afterwards(tmp_path: Path) -> None:
    groups = group_evaluations(read_evaluations(leave(tmp_path / "run", [2, 2], threshold=None)))
    assert [row["attacked"].value for row in report_rows(groups, (-1.0, 0.5, 2.0))] == [0.0, 0.5, 1.0]
    assert report_rows(groups, (0.5,), k=2)[0]["attacked_any"].value == pytest.approx(1 - 1 / 6)
    with pytest.raises(UsageError, match="pass --thresholds"):
        report_rows(groups, ())
    with pytest.raises(OptionError, match="thresholds must be numbers, not nan"):
        GCGReport("run", thresholds=(0.5, float("nan")))
    with pytest.raises(OptionError, match="k must be at most"):
        report_rows(groups, (0.5,), k=5)


def test_the_last_step_or_all(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        leave(tmp_path / "run", [step % 4], step=step)
    assert [each.step for each in read_evaluations(tmp_path / "run")] == [10]
    assert [each.step for each in read_evaluations(tmp_path / "run", "all")] == [0, 5, 10]


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no finished evaluation by gcg"):
        read_evaluations(tmp_path)
    folder = leave(tmp_path / "run", [1])
    path = folder / "gcg/step-0/answers.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "{half", encoding="utf-8")
    with pytest.raises(DataError, match=r"answers.jsonl:9: expected one JSON object"):
        read_evaluations(folder)
    path.write_text('{"goal": 0}\n', encoding="utf-8")
    with pytest.raises(DataError, match="answers.jsonl:1: expected seed, attacked, reward"):
        read_evaluations(folder)
    (folder / "gcg/step-0/settings.json").unlink()
    with pytest.raises(DataError, match=r"settings.json: No such file"):
        read_evaluations(folder)


def test_loss_by_operations_is_the_lowest_so_far() -> None:
    attacks = [
        {"losses": [3.0, 5.0, 1.0], "flops": [10.0, 20.0, 30.0], "initial_loss": 4.0, "matched": False},
        {"losses": [2.0], "flops": [10.0], "initial_loss": 9.0, "matched": True},
    ]
    grid_K, loss_K = loss_by_flops(attacks)
    assert (grid_K[0], grid_K[-1]) == (pytest.approx(10.0), pytest.approx(30.0))
    assert loss_K[0] == pytest.approx((3 + 2) / 2)
    assert loss_K[np.searchsorted(grid_K, 21.0)] == pytest.approx((3 + 2) / 2), (
        "a worse step is no loss of the best suffix"
    )
    assert loss_K[-1] == pytest.approx((1 + 2) / 2), "an attack that reached its target keeps its loss"


def test_success_by_threshold_is_a_distribution_function(tmp_path: Path) -> None:
    groups = group_evaluations(read_evaluations(leave(tmp_path / "run", [1, 3])))
    thresholds_K, rate_K = success_by_threshold(groups, groups[0].answers(True))
    assert (rate_K[0], rate_K[-1]) == (0.0, 1.0)
    assert rate_K[np.searchsorted(thresholds_K, 0.5)] == pytest.approx(0.5)


def test_a_table_of_somebody_else_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave(tmp_path / "run", [1])
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert main(["gcg-report", str(folder), "--output", str(tmp_path / "mine"), "--formats"]) == 2
    assert "is not a figure or table of this command" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before, after = leave(tmp_path / "before", [4, 2]), leave(tmp_path / "after", [1, 0])
    stem = tmp_path / "report"
    assert main(["gcg-report", str(before), "--compare", str(after), "--output", str(stem)]) == 0
    svg = stem.with_suffix(".svg").read_text(encoding="utf-8")
    assert "before, no suffix" in svg


def leave_targets(folder: Path, targets: str, bad: str, losses: str) -> Path:
    """Write an evaluation of targets without questions, a letter each, of which the answers to `bad` ones are bad."""
    folder = leave(folder, [4 * (target in bad) for target in targets])
    path = folder / "gcg/step-0/attacks.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row, target, loss in zip(rows, targets, losses, strict=True):
        row |= {"goal": "", "target": target, "loss": float(loss)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_goals_without_a_question_are_told_apart_by_their_targets(tmp_path: Path) -> None:
    (row,) = report_rows(group_evaluations(read_evaluations(leave_targets(tmp_path / "run", "abc", "a", "129"))), ())
    assert row["loss"].value == pytest.approx((1 + 2 + 9) / 3)
    assert row["goals"] == 3 and row["attacked_any"].value == pytest.approx(1 / 3)


def test_a_difference_is_over_the_goals_that_both_have_whatever_their_numbers_are(tmp_path: Path) -> None:
    first = leave_targets(tmp_path / "first", "abc", "a", "111")
    second = leave_targets(tmp_path / "second", "cad", "d", "111")
    groups = group_evaluations(each for folder in (first, second) for each in read_evaluations(folder))
    assert report_rows(groups, ())[1]["difference"].value == pytest.approx((0 + 0) / 2 - (1 + 0) / 2)
    third = leave_targets(tmp_path / "third", "cb", "", "11")
    groups = group_evaluations(each for folder in (first, third) for each in read_evaluations(folder))
    assert report_rows(groups, ())[1]["difference"].value == 0.0


def test_folders_of_one_name_are_different_methods(tmp_path: Path) -> None:
    folders = [leave(tmp_path / method / "attacked", [count]) for method, count in (("rloo", 4), ("ppo", 0))]
    groups = group_evaluations(each for folder in folders for each in read_evaluations(folder))
    assert [group.name for group in groups] == ["rloo/attacked", "ppo/attacked"]
    assert [row["attacked"].value for row in report_rows(groups, ())] == [1.0, 0.0]
    seeds = [leave(tmp_path / f"grpo-seed{k}" / "attacked", [4 * k]) for k in (0, 1)]
    (group,) = group_evaluations(each for folder in seeds for each in read_evaluations(folder))
    assert (group.name, len(group.evaluations)) == ("attacked", 2)


def test_a_folder_that_is_given_twice_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = leave(tmp_path / "run", [1])
    assert main(["gcg-report", str(folder), "--compare", f"{folder}/../run"]) == 2
    assert "is given twice; name each folder once" in capsys.readouterr().err


def test_answers_to_goals_that_were_not_attacked_are_one_line(tmp_path: Path) -> None:
    folder = leave(tmp_path / "run", [1, 2])
    path = folder / "gcg/step-0/attacks.jsonl"
    path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"answers.jsonl:9: goal 1 is none of the 1 that were attacked"):
        read_evaluations(folder)
