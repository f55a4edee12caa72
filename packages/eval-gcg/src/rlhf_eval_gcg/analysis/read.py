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

SEED = re.compile(r"-seed\d+(?=/|$)")
"""Ending of the folders of runs that differ in their seed alone."""
ANSWER_KEYS = ("goal", "seed", "attacked", "reward")
ATTACK_KEYS = ("goal", "seed", "losses", "flops", "loss", "initial_loss", "matched")


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
    place: str = ""
    """folder of the run, in full"""

    def goal_of(self, attack: Mapping[str, Any]) -> str:
        """Return a word for the goal of an attack; goals of one text may have several targets."""
        return json.dumps([attack["goal"], attack.get("target", ""), attack.get("bad_set", [])], ensure_ascii=False)

    @property
    def goals(self) -> list[str]:
        """Words for the goals, in the order of their numbers."""
        return list(dict.fromkeys(self.goal_of(row) for row in self.attacks))


@dataclass(frozen=True)
class Group:
    """Evaluations that are reported together: runs that differ in their seed alone, at one step."""

    name: str
    step: int
    evaluations: tuple[Evaluation, ...]

    def answers(self, attacked: bool) -> list[dict[str, Any]]:
        """Return the answers with or without suffixes.

        `seed` distinguishes attack seeds of different runs. `goal` is a word for the goal, whatever its number was.
        """
        return [
            {**row, "seed": (number, row["seed"]), "goal": goals[row["goal"]]}
            for number, evaluation in enumerate(self.evaluations)
            for goals in [evaluation.goals]
            for row in evaluation.answers
            if row["attacked"] == attacked
        ]

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """Return all attacks, with `seed` and `goal` as in `answers`."""
        return [
            {**row, "seed": (number, row["seed"]), "goal": evaluation.goal_of(row)}
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
    """Return groups of one folder, endings `-seedN` aside, and one step, in order of appearance.

    A group is named by the last part of its folder; by more parts where others have the same.

    Raises:
        UsageError: one folder was given twice.
    """
    groups: dict[tuple[str, int], list[Evaluation]] = {}
    for each in evaluations:
        several = groups.setdefault((SEED.sub("", each.place or each.name), each.step), [])
        if any(other.place and other.place == each.place for other in several):
            raise UsageError(f"{each.place} is given twice; name each folder once")
        several.append(each)
    names = _short_names(dict.fromkeys(place for place, _ in groups))
    return [Group(names[place], step, tuple(several)) for (place, step), several in groups.items()]


def _short_names(places: Iterable[str]) -> dict[str, str]:
    """Return for each folder the fewest last parts of its path that no other folder ends with."""
    parts = {place: Path(place).parts for place in places}
    names = {}
    for place, own in parts.items():
        others = [other for each, other in parts.items() if each != place]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        names[place] = "/".join(own[-count:])
    return names


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
    full = folder.resolve()
    found = Evaluation(full.name, step, settings, attacks, answers, str(full))
    count = len(found.goals)
    for number, row in enumerate(answers, start=1):
        if row["goal"] not in range(count):
            raise DataError(
                f"{path / ANSWERS}:{number}: goal {row['goal']!r} is none of the {count} that were attacked"
            )
    return found
