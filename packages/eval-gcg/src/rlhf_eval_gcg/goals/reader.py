"""Reading goals: from CSV or JSON files, sets of the Hugging Face hub, lists from Python, and the set that is shipped.

A goal has a target, the beginning of the answer that the attack makes likely, and a question. Without a column of questions
the suffix is the whole message. Every mistake in a file is a one-line error that names its row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlhf_core import DataError, MissingPackage, OptionError, UsageError, option
from rlhf_core.data.json import rows_of
from rlhf_core.util.text_files import read_text
from rlhf_eval_gcg.attack import Goal

__all__ = ["HARMLESS", "GoalColumns", "GoalSource", "pick_rows", "read_goals"]

HARMLESS = "harmless"
"""Name of the set that is shipped."""

GoalSource = str | Sequence[Goal | str | Sequence[str]]
"""A file or set by name; or goals, (goal, target) pairs and targets from Python."""


@dataclass(frozen=True)
class GoalColumns:
    """Names of the columns, and the split of a hub set."""

    goal: str = "goal"
    """questions; a file without it has targets alone"""
    target: str = "target"
    """beginnings of answers"""
    bad_set: str = "bad_set"
    """further answers of objective `bad_set`, a list of texts; of JSON files and hub sets"""
    split: str = "train"
    """split of a hub set"""


def read_goals(source: GoalSource, columns: GoalColumns = GoalColumns(), rows: str = "") -> list[Goal]:
    """Return the goals of `source`, at least one.

    Args:
        source: `harmless`, a .csv, .json or .jsonl file, a hub set OWNER/NAME[:CONFIG] or its folder; or a list.
        columns: names of columns.
        rows: the goals to keep, as a slice such as `:10` or `10:`; empty keeps all.

    Raises:
        DataError: a row is damaged, or there is none; names file and row.
        OptionError: `source` is not there, or `rows` is no slice.
    """
    goals = list(_goals(source, columns))
    if isinstance(source, str):
        _check_questions(goals, source, columns)
    if not goals:
        raise DataError(f"{source if isinstance(source, str) else 'goals'}: no goals; add a row with a target")
    first: dict[tuple[object, ...], str] = {}
    for goal in goals:
        place = first.setdefault((goal.goal, goal.target, goal.bad_set), goal.place)
        if place != goal.place:
            raise DataError(f"{goal.place}: the same goal and target as {place}; remove one of them")
    return pick_rows(goals, rows)


def _check_questions(goals: Sequence[Goal], source: str, columns: GoalColumns) -> None:
    """Raise `DataError` if some rows have no column of questions, or none has one that was named."""
    without = [goal for goal in goals if not goal.goal]
    if without and (len(without) < len(goals) or columns.goal != GoalColumns.goal):
        raise DataError(
            f"{without[0].place}: there is no {columns.goal!r}, "
            + (
                "which other rows have; write a question"
                if len(without) < len(goals)
                else f"the column of {source} that was asked for; set {option('goal_key')} to a column that it has"
            )
        )


def pick_rows(goals: Sequence[Goal], rows: str) -> list[Goal]:
    """Return the goals of a slice such as `:10`, `10:` or `3`.

    Raises:
        OptionError: it is no slice, or leaves nothing.
    """
    if not rows:
        return list(goals)
    try:
        parts = [int(part) if part.strip() else None for part in rows.split(":")]
        if len(parts) > 2 or (len(parts) == 1 and parts[0] is None):
            raise ValueError
    except ValueError:
        raise OptionError("rows", f"must be a slice such as :10, 10: or 3, not {rows!r}") from None
    first = parts[0]
    wanted = slice(*parts) if len(parts) == 2 else slice(first, (first or 0) + 1 if first != -1 else None)
    if not goals[wanted]:
        raise OptionError("rows", f"{rows} leaves none of the {len(goals)} goals; choose other rows")
    return list(goals[wanted])


def _goals(source: GoalSource, columns: GoalColumns) -> Iterator[Goal]:
    if not isinstance(source, str):
        for number, given in enumerate(source, start=1):
            yield _from_python(given, f"goal {number} of the list")
    elif source == HARMLESS:
        text = (files("rlhf_eval_gcg.goals") / "harmless.csv").read_text(encoding="utf-8")
        yield from _from_csv(text, "harmless.csv", columns)
    elif (ending := Path(source).suffix.lower()) == ".csv":
        yield from _from_csv(_text(source), source, columns)
    elif ending in (".json", ".jsonl"):
        for origin, row in rows_of(Path(source)):
            if not isinstance(row, Mapping):
                raise DataError(f"{origin}: expected an object with {columns.target!r}")
            yield _from_row(row, origin, columns)
    else:
        yield from _from_hub(source, columns)


def _text(path: str) -> str:
    try:
        return read_text(Path(path))
    except OSError as error:
        raise OptionError("goals", f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text ({error.reason} at byte {error.start})") from None


def _from_csv(text: str, path: str, columns: GoalColumns) -> Iterator[Goal]:
    """Yield the goals of a CSV file with a header (RFC 4180)."""
    if "\0" in text:
        raise DataError(
            f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}: the text contains a zero byte; remove it"
        )
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if columns.target not in header:
            raise DataError(
                f"{path}:1: the header has no column {columns.target!r}, but {', '.join(header) or 'nothing'}; begin the "
                f"file with goal,target, or set {option('target_key')}"
            )
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: two columns have the same name; rename one")
        begin = reader.line_num + 1
        for cells in reader:
            origin, begin = f"{path}:{begin}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{origin}: the row has {len(cells)} cells, but the header has {len(header)} columns; put texts "
                    "with commas or line breaks into double quotes"
                )
            yield _from_row(dict(zip(header, cells, strict=True)), origin, columns)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: damaged CSV ({error})") from None


def _from_hub(source: str, columns: GoalColumns) -> Iterator[Goal]:
    """Yield the goals of a hub set, or of a folder of the same kind."""
    if not Path(source).is_dir() and source.count("/") != 1:
        raise OptionError(
            "goals",
            f"{source!r} is neither a .csv, .json or .jsonl file, nor a hub dataset OWNER/NAME, nor {HARMLESS!r}",
        )
    try:
        import datasets
    except ImportError:
        raise MissingPackage("goals of the hub need datasets: python3 -m pip install 'rlhf-core[datasets]'") from None
    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=columns.split)
    except Exception as error:  # any error of the hub, the network or a damaged file
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"{option('goals')} {source}: cannot load split {columns.split!r}: {first}") from None
    for number, row in enumerate(found, start=1):
        yield _from_row(row, f"{source}:{number}", columns)


def _from_row(row: Mapping[str, Any], origin: str, columns: GoalColumns) -> Goal:
    """Return the goal of a row by name of column."""
    goal, target = row.get(columns.goal, ""), row.get(columns.target)
    if not isinstance(target, str) or not isinstance(goal, str):
        raise DataError(f"{origin}: expected texts in {columns.goal!r} and {columns.target!r}")
    if not target.strip():
        raise DataError(f"{origin}: the target is empty; write the answer that the attack aims for")
    if columns.goal in row and not goal.strip():
        raise DataError(f"{origin}: the goal is empty; write a question, or leave the column out of the whole file")
    further = row.get(columns.bad_set) or ()
    texts = isinstance(further, list | tuple) and all(isinstance(text, str) and text.strip() for text in further)
    if not texts:
        raise DataError(f"{origin}: expected a list of texts in {columns.bad_set!r}")
    return Goal(goal, target, tuple(further), origin=origin)


def _from_python(given: Goal | str | Sequence[str], origin: str) -> Goal:
    """Return a goal that Python gave as one, as a pair, or as a target."""
    if isinstance(given, Goal):
        return given
    pair = ("", given) if isinstance(given, str) else tuple(given)
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise DataError(f"{origin}: expected (goal, target) or a target, not {given!r}")
    if not pair[1].strip():
        raise DataError(f"{origin}: the target is empty; write the answer that the attack aims for")
    return Goal(pair[0], pair[1], origin=origin)
