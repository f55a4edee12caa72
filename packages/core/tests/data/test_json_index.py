"""Rows of a JSON file are found once, checked then, and parsed again when they are drawn; memory holds their places only."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.contract.batch import Example
from rlhf_core.data import json_index
from rlhf_core.data.columns import Columns
from rlhf_core.data.json import Json
from rlhf_core.data.json_index import FileIndex
from rlhf_core.data.plain_rows import PlainCheck
from rlhf_core.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def indexed(path: Path) -> list[tuple[str, Any]]:
    """The rows as the pass gives them; read again by number they are the same."""
    index = FileIndex(str(path))
    scanned = list(index.scan())
    assert [index.value(row) for row in range(len(index))] == scanned
    return [(index.origin(row).rpartition(":")[2], value) for row, value in enumerate(scanned)]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3) | st.none(), max_size=8),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["", "\ufeff"]),
    st.booleans(),
    st.sampled_from(["", " ", "\t"]),
    st.sampled_from([1, 7, 40, 2**16]),
)
def test_lines_are_what_python_reads_however_they_are_cut(
    tmp_path_factory: Any, rows: list[Any], end: str, mark: str, escape: bool, blank: str, block: int
) -> None:
    """None is a blank line. Python's own reading of lines is the reference."""
    lines = ["" if row is None else blank + json.dumps(row, ensure_ascii=escape) + blank for row in rows]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes((mark + end.join(lines)).encode())
    with path.open(encoding="utf-8-sig") as file:
        expected = [(str(n), json.loads(line)) for n, line in enumerate(file.read().split("\n"), 1) if line.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_index, "BATCH", block)
        assert indexed(path) == expected


@pytest.mark.parametrize(
    "line", ['{"prompt":\n"a"}', '{"prompt": "a"} {"prompt": "b"}', "x", '{"prompt": "\\ud800"}', "{"]
)
def test_a_line_that_is_no_row_is_named_among_rows_that_are(tmp_path: Path, line: str) -> None:
    """An object over two lines is none, though its block is a sequence of objects."""
    good = '{"prompt": "a"}\n'
    path = tmp_path / "rows.jsonl"
    path.write_text(good * 20 + "\n" + line + "\n" + good * 20)
    with pytest.raises(DataError, match=rf"{path}:22: "):
        Json(str(path))("train")
    assert len(Json(str(path), limit=20)("train")) == 20


def test_bytes_that_are_no_text_are_named_by_their_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="expected UTF-8 text .* at byte 28"):
        Json(str(path))("train")


def test_a_row_that_changed_is_named_and_lines_that_are_added_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    rows = Json(str(path))("train")
    with path.open("a") as file:
        file.write('{"prompt": "c"}\n')
    assert [row.prompt for row in rows] == ["a", "b"]
    with path.open("r+") as file:
        file.write('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row changed after the file was opened"):
        rows[0]
    assert rows[1].prompt == "b"
    path.unlink()
    path.write_text("something else")
    assert rows[1].prompt == "b"  # the file that was opened


def test_training_and_held_out_rows_are_of_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(50)))
    opened: list[str] = []
    blocks = FileIndex.blocks
    monkeypatch.setattr(FileIndex, "blocks", lambda self, limit: opened.append(self.path) or blocks(self, limit))
    data = Json(str(path), heldout=0.2)
    train, heldout = data("train"), data("heldout")
    assert (len(train), len(heldout), len(opened)) == (40, 10, 1)
    assert {row.prompt for row in (*train, *heldout)} == {str(n) for n in range(50)}
    Json(str(path), heldout=0.2, system="x")("train")  # other columns are other rows
    os.utime(path, ns=(1, 1))
    data("heldout")  # and so is a file that was written since
    assert len(opened) == 3
    del train, heldout
    gc.collect()
    assert data("train") and len(opened) == 3 + 1


def test_memory_holds_a_few_bytes_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n} " + "x" * 80, "response": "y" * 40}) + "\n" for n in range(20_000))
    )
    Json(str(path), limit=1)("train")
    tracemalloc.start()
    try:
        rows = Json(str(path), heldout=0.1)("train")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 18_000
    assert kept < 40 * 20_000  # 12 of the index, 10 of the choice, and room that arrays grow into
    assert peak < path.stat().st_size


CELLS = st.one_of(
    st.text(max_size=6),
    st.none(),
    st.integers(0, 3),
    st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "Human: ", [], [{"role": "user", "content": "a"}], {"a": 1}]),
)
NAMES = [
    "prompt",
    "response",
    "chosen",
    "rejected",
    "system",
    "context",
    "history",
    "label",
    "tools",
    "instruction",
    "input",
]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), st.text(min_size=1, max_size=3), min_size=1),
    st.dictionaries(st.sampled_from(NAMES), CELLS),
    st.sampled_from(
        [{}, {"meta_keys": ("label",)}, {"system": "s"}, {"text_key": "prompt"}, {"completion_key": "chosen"}]
    ),
)
def test_a_row_that_needs_no_check_passes_it(
    first: dict[str, Any], row: dict[str, Any], options: dict[str, Any]
) -> None:
    try:
        columns = Columns("rows.jsonl", **options).find_columns(first, "rows.jsonl:1")
    except DataError:
        return
    for each in (first, {**first, **row}, row):
        if PlainCheck(columns)(each):
            assert isinstance(columns.example(each, "rows.jsonl:2"), Example)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES[:5]), CELLS) | st.text(max_size=2), max_size=3), st.integers(0, 12)
)
def test_rows_are_accepted_together_only_if_each_is(rows: list[Any], plain: int) -> None:
    """Rows of one shape are taken together; rows of several shapes may be refused together and accepted alone."""
    usual = {"prompt": "a", "response": "b"}
    columns = Columns("rows.jsonl").find_columns(usual, "rows.jsonl:1")
    block = [usual] * plain + rows
    together, alone = PlainCheck(columns), PlainCheck(columns)
    answers = [alone(row) for row in block]  # of all of them: shapes are remembered
    each = all(answers)
    assert not together.accepts(block) or each
    if not rows:
        assert each and together.accepts(block)
    for row in block:
        together(row)  # as whoever is refused does
    assert together.shapes == alone.shapes


def test_most_rows_need_no_check() -> None:
    columns = Columns("rows.jsonl").find_columns({"prompt": "a", "response": "b"}, "rows.jsonl:1")
    assert PlainCheck(columns)({"prompt": "a", "response": "b"})
    assert not PlainCheck(columns)({"prompt": "a", "response": 1})
