"""Goals are read from every source, and every damage ends in one line that names its row."""

from __future__ import annotations

import csv
import json
from importlib.resources import files
from pathlib import Path

import pytest

from rlhf_core import DataError, OptionError, UsageError
from rlhf_eval_gcg.attack import Goal
from rlhf_eval_gcg.goals.reader import GoalColumns, read_goals


def texts(goals: list[Goal]) -> list[tuple[str, str]]:
    return [(goal.goal, goal.target) for goal in goals]


def write(folder: Path, content: str | bytes, name: str = "goals.csv") -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_shipped_set_has_harmless_goals_and_is_part_of_the_package() -> None:
    content = (files("rlhf_eval_gcg.goals") / "harmless.csv").read_text(encoding="utf-8")
    expected = [(row["goal"], row["target"]) for row in csv.DictReader(content.splitlines())]
    assert texts(read_goals("harmless")) == expected
    assert len(set(expected)) == len(expected) == 12


def test_csv_has_quotes_commas_line_breaks_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeffgoal,target\r\n"Say ""hi"", now","Hi,\nfriend"\r\n\r\nBye?,Bye\r\n')
    goals = read_goals(path)
    assert texts(goals) == [('Say "hi", now', "Hi,\nfriend"), ("Bye?", "Bye")]
    assert [goal.origin for goal in goals] == [f"{path}:2", f"{path}:5"], "the line that a row begins in"


def test_a_csv_of_targets_alone_has_empty_goals(tmp_path: Path) -> None:
    assert texts(read_goals(write(tmp_path, "target\nSure\nYes\n"))) == [("", "Sure"), ("", "Yes")]


def test_columns_can_have_other_names_and_further_ones_are_left(tmp_path: Path) -> None:
    path = write(tmp_path, "id,Behavior,Target\n1,a,b\n")
    assert texts(read_goals(path, GoalColumns(goal="Behavior", target="Target"))) == [("a", "b")]


def test_json_lines_may_have_bad_sets(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"goal": "g", "target": "t", "bad_set": ["u", "v"]}) + "\n", "goals.jsonl")
    (goal,) = read_goals(path)
    assert goal.answers == ("t", "u", "v")


def test_a_list_from_python_has_goals_pairs_and_targets() -> None:
    given = [Goal("a", "b"), ("c", "d"), "e"]
    assert texts(read_goals(given)) == [("a", "b"), ("c", "d"), ("", "e")]


def test_a_hub_set_is_read_with_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"goal": "a", "target": "b"}\n{"goal": "c", "target": "d"}\n', encoding="utf-8")
    assert texts(read_goals(str(folder), GoalColumns(split="test"))) == [("a", "b"), ("c", "d")]
    with pytest.raises(UsageError, match="cannot load split 'dev'"):
        read_goals(str(folder), GoalColumns(split="dev"))


def test_a_hub_set_may_name_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[object] = []

    def load_dataset(*words: object, split: str) -> list[dict[str, str]]:
        asked.append((*words, split))
        return [{"goal": "a", "target": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(read_goals("owner/name:small", GoalColumns(split="test"))) == [("a", "b")]
    read_goals("owner/name")
    assert asked == [("owner/name", "small", "test"), ("owner/name", None, "train")]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("", "abcd"), (":2", "ab"), ("2:", "cd"), ("1:3", "bc"), ("1", "b"), ("-1", "d"), ("-2:", "cd")],
)
def test_rows_are_a_slice(rows: str, expected: str) -> None:
    assert "".join(goal.target for goal in read_goals(list("abcd"), rows=rows)) == expected


@pytest.mark.parametrize("rows", ["x", "1:2:3", ":", "4:", "9", "1.5", "3:1"])
def test_other_rows_are_refused(rows: str) -> None:
    if rows == ":":
        assert len(read_goals(list("abcd"), rows=rows)) == 4
        return
    with pytest.raises(OptionError, match="rows"):
        read_goals(list("abcd"), rows=rows)


DAMAGES = {
    "twice": (b"goal,target\na,b\nc,d\na,b\n", "goals.csv:4: the same goal and target as"),
    "empty": (b"", "goals.csv:1: the header has no column 'target', but nothing"),
    "header_alone": (b"goal,target\n", "goals.csv: no goals; add a row"),
    "blank_rows": (b"goal,target\n\n,\n", "goals.csv: no goals"),
    "no_target_column": (b"goal,answer\na,b\n", "goals.csv:1: the header has no column 'target', but goal, answer"),
    "double_column": (b"goal,target,target\na,b,c\n", "goals.csv:1: two columns have the same name"),
    "too_many_cells": (b"goal,target\na,b\nc,d,e\n", "goals.csv:3: the row has 3 cells, but the header has 2 columns"),
    "too_few_cells": (b"goal,target\na\n", "goals.csv:2: the row has 1 cells, but the header has 2 columns"),
    "open_quote": (b'goal,target\na,b\n"c,d\ne,f\n', "goals.csv:4: damaged CSV"),
    "quote_inside": (b'goal,target\n"a"b,c\n', "goals.csv:2: damaged CSV"),
    "nul": (b"goal,target\na\0,b\n", "goals.csv:2: the text contains a zero byte"),
    "empty_target": (b"goal,target\na,b\nc, \n", "goals.csv:3: the target is empty"),
    "empty_goal": (b"goal,target\n ,b\n", "goals.csv:2: the goal is empty; write a question, or leave the column out"),
    "not_utf8": (b"goal,target\n\xff\xfe,b\n", "goals.csv: expected UTF-8 text"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_csv_is_one_line(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGES[damage]
    path = write(tmp_path, content)
    with pytest.raises(DataError) as raised:
        read_goals(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('["a", "b"]', "goals.jsonl:1: expected an object"),
        ('{"goal": "a"}', "goals.jsonl:1: expected texts in 'goal' and 'target'"),
        ('{"goal": 3, "target": "b"}', "goals.jsonl:1: expected texts"),
        ('{"goal": "a", "target": "b", "bad_set": "c"}', "goals.jsonl:1: expected a list of texts in 'bad_set'"),
        ('{"goal": "a", "target": "b", "bad_set": 5}', "goals.jsonl:1: expected a list of texts in 'bad_set'"),
        ('{"goal": "a", "target": "b", "bad_set": {"c": 1}}', "goals.jsonl:1: expected a list of texts in 'bad_set'"),
        ('{"goal": "a", "target": "b", "bad_set": [""]}', "goals.jsonl:1: expected a list of texts"),
        ('{"goal": "a"', "goals.jsonl:1: expected one JSON object per line"),
    ],
)
def test_a_damaged_json_line_is_one_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        read_goals(write(tmp_path, row + "\n", "goals.jsonl"))
    assert message in str(raised.value)


@pytest.mark.parametrize("source", ["absent.csv", "no-set", "."])
def test_a_source_that_is_none_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="goals") as raised:
        read_goals(source)
    assert "\n" not in str(raised.value)


def test_an_empty_list_and_a_damaged_pair_are_one_line() -> None:
    with pytest.raises(DataError, match="goals: no goals"):
        read_goals([])
    with pytest.raises(DataError, match="goal 1 of the list: expected"):
        read_goals([("a", "b", "c")])
    with pytest.raises(DataError, match="goal 2 of the list: the target is empty"):
        read_goals(["a", ("b", " ")])


def test_a_column_of_questions_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Else every suffix would silently be the whole message."""
    path = write(tmp_path, "question,target\na,b\n")
    with pytest.raises(DataError, match=r"goals.csv:2: there is no 'prompt', the column of .* that was asked for"):
        read_goals(path, GoalColumns(goal="prompt"))


def test_a_row_without_the_question_that_others_have_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"goal": "a", "target": "b"}\n{"target": "c"}\n', "goals.jsonl")
    with pytest.raises(DataError, match="goals.jsonl:2: there is no 'goal', which other rows have"):
        read_goals(path)
