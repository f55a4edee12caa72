"""Conversion of rows to examples, in addition to the tables of test_data_table.py and data_mistakes.py."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contract.batch import Example
from rlhf_core.data.chats import format_dialogue, parse_dialogue
from rlhf_core.data.columns import lookup
from rlhf_core.data.json import Json
from rlhf_core.data.prompts import ShippedPrompts
from rlhf_core.errors import UsageError


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    """A file of rows; strings are written as they are."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def only(folder: Path, row: Any, **options: Any) -> Example:
    """The example that one row becomes."""
    (example,) = Json(written(folder, row), **options)("train")
    return example


def test_a_list_of_objects_is_read_like_lines(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=2), name="rows.json")
    examples = Json(path)("train")
    assert [(example.prompt, example.origin) for example in examples] == [("a", f"{path}:1"), ("b", f"{path}:2")]


def test_line_numbers_count_blank_lines_and_rare_separators_stay_inside_text(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a\u2028b"}, "", {"prompt": "c"})
    assert [(e.prompt, e.origin.rpartition(":")[2]) for e in Json(path)("train")] == [("a\u2028b", "1"), ("c", "3")]


def test_labels_metadata_and_numbers_go_along(tmp_path: Path) -> None:
    row = {"prompt": "a", "label": [1], "id": 7, "datasource": "web", "margin": 2, "tools": []}
    example = only(tmp_path, row, meta_keys=("id",), number_keys=("margin",))
    assert (example.label, example.meta, example.fields) == ([1], {"id": 7, "datasource": "web"}, {"margin": 2.0})


def test_held_out_rows_are_a_fixed_share_and_never_trained_on(tmp_path: Path) -> None:
    path = written(tmp_path, *({"prompt": str(i)} for i in range(50)))
    train, heldout = ({e.prompt for e in Json(path, heldout=0.2)(split)} for split in ("train", "heldout"))
    assert len(heldout) == 10
    assert train | heldout == {str(i) for i in range(50)}
    assert not train & heldout
    assert heldout == {e.prompt for e in Json(path, heldout=10)("heldout")}


def test_a_held_out_file_leaves_the_training_rows_alone(tmp_path: Path) -> None:
    data = Json(written(tmp_path, {"prompt": "a"}), heldout_path=written(tmp_path, {"prompt": "b"}, name="h.jsonl"))
    assert [data(split)[0].prompt for split in ("train", "heldout")] == ["a", "b"]


@pytest.mark.parametrize(("heldout", "message"), [(0.0, "no rows are held out"), (2, "gives 0 rows to train on")])
def test_holding_out_nothing_or_everything_is_refused(tmp_path: Path, heldout: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Json(written(tmp_path, {"prompt": "a"}, {"prompt": "b"}), heldout=heldout)("heldout")


def test_duplicates_go_if_asked_and_the_first_stays(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "a", "label": 1}, {"prompt": "b"}, {"prompt": "a", "label": 2})
    path = written(tmp_path, *({"prompt": p, "label": i} for i, p in enumerate("aba")))
    assert [e.label for e in Json(path, unique=True)("train")] == [0, 1]
    assert [e.label for e in Json(path)("train")] == [0, 1, 2]


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert len(Json(written(tmp_path, {"prompt": "a"}, {"prompt": "b"}), limit=1)("train")) == 1


def test_a_dialogue_survives_the_way_to_messages_and_back() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c d\n\nAssistant: e"
    assert format_dialogue(parse_dialogue(text)) == text


def test_a_key_is_a_name_before_it_is_a_path() -> None:
    assert lookup({"a/b": 1, "a": {"b": 2}}, "a/b") == 1


def test_readers_travel_to_other_processes(tmp_path: Path) -> None:
    data = Json(written(tmp_path, {"prompt": "a"}), system="x")
    assert pickle.loads(pickle.dumps(data)) == data


def test_shipped_prompts_are_distinct_and_their_split_is_fixed() -> None:
    train, heldout = ShippedPrompts()("train"), ShippedPrompts()("heldout")
    assert (len(train), len(heldout)) == (150, 50)
    assert len({example.prompt for example in (*train, *heldout)}) == 200
    assert all(isinstance(e.prompt, str) and e.prompt == e.prompt.strip() and len(e.prompt) < 90 for e in train)
    with pytest.raises(UsageError, match="not 'test'"):
        ShippedPrompts()("test")


def test_shipped_prompts_may_have_a_system_prompt() -> None:
    plain, chats = ShippedPrompts()("train"), ShippedPrompts(system="Be brief.")("train")
    asked = [({"role": "system", "content": "Be brief."}, {"role": "user", "content": each.prompt}) for each in plain]
    assert [chat.prompt for chat in chats] == asked
