"""Reading what evaluations left: OUTPUT/gcg/step-N of runs and of `rlhf-run eval`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core import DataError, UsageError
from rlhf_eval_gcg.evaluation.files import ANSWERS, SETTINGS
from rlhf_eval_gcg.evaluation.store import ATTACKS, read_lines

__all__ = ["Evaluation", "Group", "group_evaluations", "read_evaluations"]

ANSWER_KEYS = ("goal", "seed", "attacked", "reward")
ATTACK_KEYS = ("seed", "losses", "flops", "loss", "initial_loss", "matched")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation by attacks."""

    name: str
    """folder of the run"""
    step: int
    settings: Mapping[str, Any]
    attacks: Sequence[Mapping[str, Any]]
    """a mapping per attack"""
    answers: Sequence[Mapping[str, Any]]
    """a mapping per answer"""


@dataclass(frozen=True)
class Group:
    """Evaluations that are reported together: runs that differ in their seed alone, at one step."""

    name: str
    step: int
    evaluations: tuple[Evaluation, ...]

    def answers(self, attacked: bool) -> list[dict[str, Any]]:
        """Return the answers with or without suffixes; `seed` distinguishes attack seeds of different runs."""
        return [
            {**row, "seed": (number, row["seed"])}
            for number, evaluation in enumerate(self.evaluations)
            for row in evaluation.answers
            if row["attacked"] == attacked
        ]

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """Return all attacks; `seed` distinguishes attack seeds of different runs."""
        return [
            {**row, "seed": (number, row["seed"])}
            for number, evaluation in enumerate(self.evaluations)
            for row in evaluation.attacks
        ]


def read_evaluations(folder: Path, steps: str = "last") -> list[Evaluation]:
    """Return the evaluations of a run's folder, of its last step or of `all`, by step.

    Raises:
        UsageError: there is none.
        DataError: a file is damaged; names it.
    """
    found = sorted(
        (int(path.name.removeprefix("step-")), path)
        for path in (folder / "gcg").glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and (path / ANSWERS).exists()
    )
    if not found:
        raise UsageError(
            f"{folder} contains no finished evaluation by gcg; write one with rlhf-run eval and the evaluator gcg"
        )
    return [_read(folder, step, path) for step, path in (found if steps == "all" else found[-1:])]


def group_evaluations(evaluations: Iterable[Evaluation]) -> list[Group]:
    """Return groups of one name, the ending `-seedN` aside, and one step, in order of appearance."""
    groups: dict[tuple[str, int], list[Evaluation]] = {}
    for each in evaluations:
        groups.setdefault((re.sub(r"-seed\d+$", "", each.name), each.step), []).append(each)
    return [Group(name, step, tuple(several)) for (name, step), several in groups.items()]


def _read(folder: Path, step: int, path: Path) -> Evaluation:
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path / SETTINGS}: {error.strerror or error}") from None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise DataError(f"{path / SETTINGS}: expected a JSON object")
    attacks, answers = read_lines(path / ATTACKS), read_lines(path / ANSWERS)
    for file, rows, keys in ((ATTACKS, attacks, ATTACK_KEYS), (ANSWERS, answers, ANSWER_KEYS)):
        for number, row in enumerate(rows, start=1):
            absent = [key for key in keys if key not in row]
            if absent:
                raise DataError(f"{path / file}:{number}: expected {', '.join(absent)}")
    return Evaluation(folder.resolve().name, step, settings, attacks, answers)
