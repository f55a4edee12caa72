"""Rows of every usual shape become examples, and what is wrong with a row is said in one line with its place."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.data.chats import as_dialogue, parse_dialogue
from rlhf_core.data.columns import lookup
from rlhf_core.data.json import Json
from rlhf_core.data.prompts import ShippedPrompts
from rlhf_core.errors import DataError, UsageError
from rlhf_core.types import Example

USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}


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


SHAPES: list[tuple[str, dict[str, Any], dict[str, Any], Any, tuple[Any, ...]]] = [
    ("a prompt", {"prompt": "Hi?"}, {}, "Hi?", ()),
    ("a question", {"question": "Hi?"}, {}, "Hi?", ()),
    ("an instruction", {"instruction": "Hi?"}, {}, "Hi?", ()),
    ("an input", {"input": "Hi?"}, {}, "Hi?", ()),
    ("prompt before question", {"question": "b", "prompt": "a"}, {}, "a", ()),
    ("prompt and response", {"prompt": "Hi?", "response": "Yes."}, {}, "Hi?", ("Yes.",)),
    ("question and answer", {"question": "Hi?", "answer": "Yes."}, {}, "Hi?", ("Yes.",)),
    ("prompt and completion", {"prompt": "Hi?", "completion": "Yes."}, {}, "Hi?", ("Yes.",)),
    ("input and output", {"input": "Hi?", "output": "Yes."}, {}, "Hi?", ("Yes.",)),
    ("response before answer", {"prompt": "Hi?", "answer": "b", "response": "a"}, {}, "Hi?", ("a",)),
    ("Alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, {}, "Add.\n\n1 2", ("3",)),
    ("Alpaca, no input", {"instruction": "Add.", "input": "", "output": "3"}, {}, "Add.", ("3",)),
    ("named keys", {"goal": "a", "target": "b"}, {"prompt_key": "goal", "completion_key": "target"}, "a", ("b",)),
    ("nested", {"x": {"y": ["a", "b"]}}, {"prompt_key": "x/y/-1"}, "b", ()),
    ("a key with a slash", {"x/y": "a"}, {"prompt_key": "x/y"}, "a", ()),
    ("a chat to answer", {"messages": [SYSTEM, USER]}, {}, (SYSTEM, USER), ()),
    ("a chat with its answer", {"messages": [USER, ASSISTANT]}, {}, (USER,), ("Yes.",)),
    ("the last turn", {"messages": [USER, ASSISTANT, USER, OTHER]}, {}, (USER, ASSISTANT, USER), ("No.",)),
    (
        "all turns",
        {"messages": [USER, ASSISTANT, USER, OTHER]},
        {"turns": "all"},
        (USER,),
        ((ASSISTANT, USER, OTHER),),
    ),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
        {},
        (USER,),
        ("Yes.",),
    ),
    ("a chat beside its prompt", {"prompt": "Hi?", "messages": [USER, ASSISTANT]}, {}, (USER,), ("Yes.",)),
    ("a chat as prompt", {"prompt": [USER], "response": "Yes."}, {}, (USER,), ("Yes.",)),
    ("a system prompt", {"prompt": "Hi?"}, {"system": "Be brief."}, (SYSTEM, USER), ()),
    ("a system prompt of its own", {"messages": [SYSTEM, USER]}, {"system": "Be long."}, (SYSTEM, USER), ()),
    ("answers", {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}, {}, "Hi?", ("Yes.", "No.")),
    ("answers in messages", {"prompt": "Hi?", "chosen": [ASSISTANT], "rejected": [OTHER]}, {}, "Hi?", ("Yes.", "No.")),
    ("whole chats", {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, {}, (USER,), ("Yes.", "No.")),
    (
        "whole chats beside their prompt",
        {"prompt": "Hi?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {},
        (USER,),
        ("Yes.", "No."),
    ),
    (
        "HH",
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
        {},
        (USER,),
        ("Yes.", "No."),
    ),
    (
        "HH that parts at an earlier turn",
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: a\n\nAssistant: b",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: c\n\nAssistant: d",
        },
        {},
        (USER,),
        (
            (ASSISTANT, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
            (ASSISTANT, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}),
        ),
    ),
    (
        "an empty HH answer",
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: ", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
        {},
        (USER,),
        ("", "No."),
    ),
    ("an HH speaker twice", {"prompt": "Human: a\n\nHuman: b"}, {}, ({"role": "user", "content": "a\n\nb"},), ()),
    (
        "an HH prompt with answers",
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
        {},
        (USER,),
        ("Yes.", "No."),
    ),
    (
        "the same twice",
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {},
        (USER,),
        ("Yes.", "Yes."),
    ),
    ("an HH prompt", {"prompt": "\n\nHuman: Hi?\n\nAssistant:"}, {}, (USER,), ()),
    ("a whole HH dialogue", {"prompt": "\n\nHuman: Hi?\n\nAssistant: Yes."}, {}, (USER,), ("Yes.",)),
    ("a text", {"text": "Once."}, {}, "", ("Once.",)),
    ("a named text", {"prompt": "x", "body": "Once."}, {"text_key": "body"}, "", ("Once.",)),
    ("an answer kept for rewards", {"question": "Hi?", "answer": "4"}, {"label_key": "answer"}, "Hi?", ()),
    ("one of a pair", {"prompt": "Hi?", "chosen": "a", "rejected": "b"}, {"completion_key": "chosen"}, "Hi?", ("a",)),
]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "completions"), [s[1:] for s in SHAPES], ids=[s[0] for s in SHAPES]
)
def test_a_row_of_a_usual_shape_needs_no_or_few_words(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], prompt: Any, completions: tuple[Any, ...]
) -> None:
    example = only(tmp_path, row, **options)
    assert example.prompt == prompt
    assert example.completions == completions
    assert example.origin.endswith("rows.jsonl:1")


MISTAKES: list[tuple[str, list[Any], dict[str, Any], str]] = [
    ("not JSON", [{"prompt": "a"}, "{oops"], {}, "rows.jsonl:2: expected one JSON object a line"),
    (
        "not an object",
        [{"prompt": "a"}, "3"],
        {},
        "rows.jsonl:2: a row should be an object with named columns, not int",
    ),
    ("first row not an object", ["3"], {}, "rows.jsonl:1: a row should be an object with named columns, not int"),
    ("no rows", [""], {}, "rows.jsonl: the file has no rows"),
    ("no prompt", [{"a": 1, "b": 2}], {}, "rows.jsonl:1: no prompt among the columns a, b; pass --data.prompt-key"),
    ("a column goes missing", [{"prompt": "a"}, {"x": 1}], {}, "rows.jsonl:2: expected a column 'prompt'; there are x"),
    ("a wrong name", [{"a": "b"}], {"prompt_key": "c"}, "rows.jsonl:1: expected a column 'c'; there are a"),
    (
        "a wrong path",
        [{"a": {"b": ["x"]}}],
        {"prompt_key": "a/b/3"},
        "rows.jsonl:1: expected a column '3' in 'a/b'",
    ),
    ("a number as prompt", [{"prompt": 3}], {}, "rows.jsonl:1: 'prompt' should be text or a chat, not int"),
    ("null as prompt", [{"prompt": None}], {}, "rows.jsonl:1: 'prompt' should be text or a chat, not null"),
    ("a number as completion", [{"prompt": "a", "answer": 4}], {}, "'answer' should be text or a chat, not int"),
    ("an empty chat", [{"messages": []}], {}, "rows.jsonl:1: 'messages': a chat has at least one message"),
    ("not a message", [{"messages": [USER, "x"]}], {}, '\'messages\': message 1 should be {"role": …, "content": …}'),
    ("no content", [{"messages": [{"role": "user"}]}], {}, "'messages': message 0 (user) has no content"),
    ("no question", [{"messages": [ASSISTANT]}], {}, "rows.jsonl:1: the chat begins with the assistant"),
    (
        "answers without prompt",
        [{"chosen": "a", "rejected": "b"}],
        {},
        "'chosen' is an answer, so a prompt is expected",
    ),
    (
        "half a pair",
        [{"prompt": "a", "good": "b"}],
        {"chosen_key": "good"},
        "needs --data.chosen-key and --data.rejected-key",
    ),
    (
        "two kinds of sides",
        [{"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": "b"}],
        {},
        "'chosen' and 'rejected' should both be dialogues or both be answers",
    ),
    (
        "no shared prompt",
        [{"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}],
        {},
        "chosen and rejected should begin with the same prompt",
    ),
    (
        "a margin in words",
        [{"prompt": "a", "margin": "big"}],
        {"number_keys": ("margin",)},
        "'margin' should be a finite",
    ),
    ("an infinite margin", [{"prompt": "a", "margin": float("inf")}], {"number_keys": ("margin",)}, "not inf"),
    ("a text in numbers", [{"text": 4}], {}, "rows.jsonl:1: 'text' should be text, not int"),
    ("a label that is missing", [{"prompt": "a"}], {"label_key": "y"}, "rows.jsonl:1: expected a column 'y'"),
]


@pytest.mark.parametrize(("rows", "options", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_malformed_row_is_named_with_what_was_expected(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        Json(written(tmp_path, *rows), **options)("train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"^nowhere\.jsonl: No such file"):
        Json("nowhere.jsonl")("train")


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl: expected UTF-8 text"):
        Json(str(tmp_path / "latin.jsonl"))("train")


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


@pytest.mark.parametrize(("heldout", "message"), [(0.0, "no rows are held out"), (2, "leaves 0 of 2 rows")])
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
    assert as_dialogue(parse_dialogue(text)) == text


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
