"""Rows as tables and OpenAI's API give them: what they mean is read, and what is not read is named once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from families import TEMPLATES, family
from test_data_columns import only, written

from rlhf_core.contract.batch import Example
from rlhf_core.data.chats import split_chat, to_chat
from rlhf_core.data.columns import report_unread
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.json import Json
from rlhf_core.errors import DataError

ASKED = {"role": "user", "content": "Weather?"}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    """An assistant's message that calls a function."""
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function, **more}]}


@pytest.mark.parametrize(
    "message",
    [
        call('{"city": "Paris", "days": [1, null]}', id="call_1"),
        call({"city": "Paris", "days": [1, None], "unit": None}, id="call_1"),
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_1", "name": "weather", "arguments": '{"city": "Paris", "days": [1, null]}'}],
        },
        {
            "role": "assistant",
            "function_call": {"name": "weather", "arguments": '{"city": "Paris", "days": [1, null]}'},
        },
    ],
    ids=["JSON text", "a struct of a table", "without function", "function_call"],
)
def test_arguments_of_tool_calls_are_mappings(message: dict[str, Any]) -> None:
    (_, read) = to_chat([ASKED, message])
    (called,) = read["tool_calls"]
    function = called.get("function", called)
    assert function["arguments"] == {"city": "Paris", "days": [1, None]}
    assert function["name"] == "weather"
    assert read.keys() == {"role", "tool_calls"}


def test_a_template_that_iterates_over_arguments_and_one_that_writes_json_read_openai_s_text() -> None:
    """Against the text that a mapping gives."""
    shown = "{% for c in m.tool_calls or [] %}{{ ARGUMENTS }}{% endfor %}<|im_end|>\n{% endfor %}"
    for how, expected in (
        ("c.function.arguments | tojson", '{"city": "Paris"}'),
        ("c.function.arguments.items() | map('join', '=') | join(' ')", "city=Paris"),
    ):
        template = TEMPLATES["chatml"].replace("<|im_end|>\n{% endfor %}", shown.replace("ARGUMENTS", how), 1)
        tokenizer = family("qwen")
        chat = [ASKED, call('{"city": "Paris"}')]
        text = tokenizer.apply_chat_template(list(to_chat(chat)), chat_template=template, tokenize=False)
        assert expected in text
        assert "\\" not in text


@pytest.mark.parametrize("arguments", ["{city", "[1]", "7"])
def test_arguments_that_are_no_object_are_named(tmp_path: Path, arguments: str) -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: 'messages': message 1: the arguments of the tool call 'weather'"
    ):
        only(tmp_path, {"messages": [ASKED, call(arguments)]})


def test_numbers_in_columns_of_text_are_text(tmp_path: Path) -> None:
    """A table makes a whole number beside empty cells one with a point."""
    row = {"question": 12, "answer": 7.0}
    example = only(tmp_path, row)
    assert (example.prompt, example.completions) == ("12", ("7",))
    assert only(tmp_path, {"prompt": "a", "chosen": 0.25, "rejected": -3}).completions == ("0.25", "-3")
    assert only(tmp_path, {"text": 5}).completions == ("5",)
    assert only(tmp_path, {"messages": [ASKED, {"role": "assistant", "content": 9}]}).completions == ("9",)
    for wrong in (True, None, {}):
        with pytest.raises(DataError, match="rows.jsonl:1: 'answer' should be text or a chat, not "):
            only(tmp_path, {"question": "a", "answer": wrong})


def test_system_context_and_history_stand_before_the_prompt(tmp_path: Path) -> None:
    pairs = [["Hi", "Hello"]]
    row = {"instruction": "Who?", "context": "Ann is here.", "output": "Ann.", "system": "Be brief.", "history": pairs}
    example = only(tmp_path, row)
    assert example.prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Ann is here.\n\nWho?"},
    )
    chats = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert only(tmp_path, {**row, "history": chats}).prompt == example.prompt
    without = {"system_key": "none", "context_key": "none", "history_key": "none"}
    assert only(tmp_path, row, **without).prompt == "Who?"
    own = [{"role": "system", "content": "Own."}, ASKED]
    assert only(tmp_path, {"prompt": own, "answer": "a", "system": "Be brief."}).prompt == tuple(own)


def test_rows_without_a_system_prompt_stay_as_they_are_beside_rows_with_one(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "system": "Be brief."}, {"prompt": "c", "system": None}]
    first, second, third = Json(written(tmp_path, *rows))("train")
    assert (first.prompt, third.prompt) == ("a", "c")
    assert second.prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"})


def test_columns_of_another_shape_and_those_that_metadata_takes_are_not_put_before(tmp_path: Path) -> None:
    row = {"question": "Who?", "answer": "Ann.", "context": {"title": ["Ann"]}, "history": "none"}
    assert only(tmp_path, row).prompt == "Who?"
    taken = only(tmp_path, {**row, "context": "Ann is here."}, meta_keys=("context",))
    assert (taken.prompt, taken.meta) == ("Who?", {"context": "Ann is here."})


def test_columns_that_nothing_reads_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report_unread.cache_clear()
    caplog.set_level(logging.INFO, "rlhf")
    row = {"prompt": "a", "passage": "b", "id": 1, "datasource": "c", "margin": 2.0, "label": 1, "nested": {"x": 1}}
    path = written(tmp_path, row, row)
    for _ in range(2):
        Json(path, number_keys=("margin",), meta_keys=("nested/x",))("train")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: unused columns: passage, id (")
    assert json.loads(Path(path).read_text().splitlines()[0]) == row


def test_the_encoder_trains_on_a_tool_call_given_as_json_text() -> None:
    template = TEMPLATES["chatml"].replace(
        "{{ m.content }}", "{{ m.content or m.tool_calls[0].function.arguments | tojson }}"
    )
    tokenizer = family("qwen")
    encoder = Encoder(tokenizer)
    encoder._renderer.template = template
    row = encoder.row(Example(*split_chat(to_chat([ASKED, call('{"city": "Paris"}')]))))
    assert tokenizer.decode(row.completions[0].ids) == '{"city": "Paris"}<|im_end|>'
