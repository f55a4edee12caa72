"""Tables of users' data; data_mistakes.py has their mistakes.

SHAPES: rows and the examples they become. FORMATS: files the readers open. TEMPLATES: examples and the text a model reads,
with « » around what is trained on. MIXTURES: sets and the rows drawn from them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.data.hf import HuggingFaceData
from rlhf_core.data.json import Json
from rlhf_core.models.loading.tokenizer import load_tokenizer

USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}


def written(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    """A file of rows; strings and bytes are written as they are."""
    path = folder / name
    lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# shapes
# ----------------------------------------------------------------------------------------------------------------------

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
    ("text in parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}]}, {}, (USER,), ()),
    (
        "a tool's answer",
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ASSISTANT]},
        {},
        (USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}),
        ("Yes.",),
    ),
]


@pytest.mark.parametrize(
    ("row", "options", "prompt", "completions"), [s[1:] for s in SHAPES], ids=[s[0] for s in SHAPES]
)
def test_a_row_of_a_usual_shape_needs_no_or_few_words(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], prompt: Any, completions: tuple[Any, ...]
) -> None:
    (example,) = Json(written(tmp_path, row), **options)("train")
    assert example.prompt == prompt
    assert example.completions == completions
    assert example.origin.endswith("rows.jsonl:1")


def test_tools_are_a_list_or_json_text_of_one(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT], "tools": tools} for tools in ([CALL], json.dumps([CALL]))]
    assert [example.meta["tools"] for example in Json(written(tmp_path, *rows))("train")] == [[CALL], [CALL]]


# ----------------------------------------------------------------------------------------------------------------------
# formats
# ----------------------------------------------------------------------------------------------------------------------

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
LINES = "\n".join(map(json.dumps, ROWS))

FORMATS: list[tuple[str, str, str, str]] = [
    ("lines", "json", "rows.jsonl", LINES),
    ("a list", "json", "rows.json", json.dumps(ROWS, indent=2)),
    ("with a byte-order mark", "json", "rows.jsonl", "\ufeff" + LINES),
    ("with blank lines", "json", "rows.jsonl", "\n" + LINES.replace("\n", "\n\n")),
    ("with Windows ends of line", "json", "rows.jsonl", LINES.replace("\n", "\r\n")),
    ("lines", "hf", "rows.jsonl", LINES),
    ("csv", "hf", "rows.csv", "question,answer\nq0,a0\nq1,a1\nq2,a2\n"),
    ("tsv", "hf", "rows.tsv", "question\tanswer\nq0\ta0\nq1\ta1\nq2\ta2\n"),
    ("json@folder", "hf", "train.jsonl", LINES),
]  # parquet, arrow and saved folders, which are no text: test_data_hf.py


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: Any) -> Iterator[None]:
    """Nothing is left in, or taken from, the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the library leaves open files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("reader", "name", "text"), [f[1:] for f in FORMATS], ids=[f"{f[1]}: {f[0]}" for f in FORMATS])
def test_every_format_gives_the_rows(tmp_path: Path, reader: str, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    path = f"json@{tmp_path}" if name == "train.jsonl" else str(tmp_path / name)
    examples = list((Json if reader == "json" else HuggingFaceData)(path)("train"))
    assert [(e.prompt, e.completions) for e in examples] == [(row["question"], (row["answer"],)) for row in ROWS]


# ----------------------------------------------------------------------------------------------------------------------
# templates
# ----------------------------------------------------------------------------------------------------------------------

OPENED = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
PLAIN_FILE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOLS_FILE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ messages[0].content }}>"
    "{% if not add_generation_prompt %}{{ messages[-1].content }}<|im_end|>{% endif %}"
)

TEMPLATES: list[tuple[str, Example, dict[str, Any], str]] = [
    ("the tokenizer's", Example("Hi?", ("Yes.",)), {}, OPENED + "«Yes.<|im_end|>»"),
    (
        "a chat",
        Example((SYSTEM, USER), ("Yes.",)),
        {},
        "<|im_start|>system\nBe brief.<|im_end|>\n" + OPENED + "«Yes.<|im_end|>»",
    ),
    ("a pair", Example("Hi?", ("Yes.", "No.")), {}, OPENED + "«Yes.<|im_end|>»«No.<|im_end|>»"),
    (
        "every turn",
        Example((USER,), ((ASSISTANT, USER, OTHER),)),
        {},
        OPENED + "«Yes.<|im_end|>»\n" + OPENED + "«No.<|im_end|>»",
    ),
    ("raw", Example("Hi?", (" Yes.",)), {"template": "raw"}, "Hi?« Yes.<|im_end|>»"),
    ("a chat, raw", Example((USER,), ("Yes.",)), {"template": "raw"}, "\n\nHuman: Hi?\n\nAssistant:« Yes.<|im_end|>»"),
    ("around a prompt", Example("Hi?", ("4",)), {"input_template": "Q: {} A:"}, "Q: Hi? A:«4<|im_end|>»"),
    ("of a file", Example("Hi?", ("Yes.",)), {"template_file": PLAIN_FILE}, "user: Hi?\nassistant: «Yes.\n<|im_end|>»"),
    (
        "with tools",
        Example("Hi?", ("3",), meta={"tools": [CALL]}),
        {"template_file": TOOLS_FILE},
        "[clock]Hi?>«3<|im_end|>»",
    ),
    ("pre-training", Example("", ("Once.",)), {}, "<|im_end|>«Once.<|im_end|>»"),
    ("cut", Example("Hi?", ("Yes.",)), {"template": "raw", "max_tokens": 5, "too_long": "truncate"}, "Hi?«Ye»"),
]


@pytest.mark.parametrize(("example", "options", "expected"), [t[1:] for t in TEMPLATES], ids=[t[0] for t in TEMPLATES])
def test_a_template_gives_this_text_and_trains_on_that(
    tmp_path: Path, example: Example, options: dict[str, Any], expected: str
) -> None:
    if "template_file" in options:
        (tmp_path / "t.jinja").write_text(options["template_file"])
        options = {**options, "template_file": str(tmp_path / "t.jinja")}
    encoder = Encoder(load_tokenizer("tiny", ModelOptions()), encoding=Encoding(**options))
    row = encoder.truncate(encoder.row(example))
    assert row is not None
    text = str(encoder.tokenizer.decode(row.ids))
    for side in row.completions:
        words = [str(encoder.tokenizer.decode([token])) for token in side.ids]
        text += "".join(f"«{word}»" if on else word for word, on in zip(words, side.mask)).replace("»«", "")
    assert text == expected


# ----------------------------------------------------------------------------------------------------------------------
# mixtures
# ----------------------------------------------------------------------------------------------------------------------

MIXTURES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("in turn", {}, ["a0", "a1", "a1", "b0", "b1", "b2", "a0"]),
    ("capped each", {"limit_each": 2}, ["a0", "a1", "b0", "b1"]),
    ("capped in all", {"limit": 4}, ["a0", "a1", "a1", "b0"]),
    ("capped both ways", {"limit_each": 2, "limit": 3}, ["a0", "a1", "b0"]),
    ("distinct", {"unique": True}, ["a0", "a1", "b0", "b1", "b2"]),
    ("distinct and capped", {"unique": True, "limit": 3}, ["a0", "a1", "b0"]),
    ("streamed", {"streaming": True, "shuffle_buffer": 0}, ["a0", "a1", "a1", "b0", "b1", "b2", "a0"]),
    ("streamed and capped", {"streaming": True, "shuffle_buffer": 0, "limit": 4}, ["a0", "a1", "a1", "b0"]),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("options", "expected"), [m[1:] for m in MIXTURES], ids=[m[0] for m in MIXTURES])
def test_a_mixture_gives_these_rows(tmp_path: Path, options: dict[str, Any], expected: list[str]) -> None:
    one = written(tmp_path, *({"prompt": p} for p in ("a0", "a1", "a1")), name="one.jsonl")
    two = written(tmp_path, *({"prompt": p} for p in ("b0", "b1", "b2", "a0")), name="two.jsonl")
    rows = HuggingFaceData(f"{one},{two}", **options)("train")
    assert [e.prompt for e in rows] == expected
    assert {e.meta["datasource"] for e in rows if str(e.prompt).startswith("b")} == {two}


def test_the_tables_have_the_rows_they_promise() -> None:
    assert len(SHAPES) + len(FORMATS) + len(TEMPLATES) + len(MIXTURES) >= 60
