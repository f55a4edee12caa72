"""Elements of a file that is one JSON list; Python's own reading of the whole text is the reference, wherever it is cut."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data import json_list
from rlhf_core.data.json import Json
from rlhf_core.data.json_index import FileIndex
from rlhf_core.errors import DataError

TEXTS = st.text(max_size=8) | st.sampled_from(['"', "\\", "\\u0041", "}, {", '"}, {"', "],", "é", "😀", "\n", ""])
"""Among others what looks like the end of an element, and letters of one to four bytes."""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
BLANKS = st.sampled_from(["", " ", "\n", "\r\n  ", "\t"])
SIZES = st.sampled_from([1, 2, 3, 7, 40, 2**20])


@contextmanager
def cut(block: int, batch: int) -> Any:
    """Read and parse in pieces of these sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "BLOCK", block)
        patch.setattr(json_list, "BATCH", batch)
        yield


def indexed(path: Path) -> list[tuple[str, Any]]:
    """The rows as the pass gives them; read again by number they are the same."""
    index = FileIndex(str(path))
    scanned = list(index.scan())
    assert [index.value(row) for row in range(len(index))] == scanned
    return [(index.origin(row).rpartition(":")[2], value) for row, value in enumerate(scanned)]


@st.composite
def list_texts(draw: Any) -> str:
    """The text of a list, with any blanks between its parts."""
    escape, indent = draw(st.booleans()), draw(st.sampled_from([None, 0, 3]))
    text, separator = draw(BLANKS) + "[", draw(BLANKS)
    usual = draw(BLANKS) + "," + draw(BLANKS)
    for value in draw(st.lists(VALUES, max_size=12)):
        text += separator + json.dumps(value, ensure_ascii=escape, indent=indent)
        separator = draw(st.just(usual) | BLANKS.map(lambda blank: blank + ","))
    return text + draw(BLANKS) + "]" + draw(BLANKS)


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, written out or escaped: it is refused."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@settings(max_examples=150, deadline=None)
@given(list_texts().filter(is_unicode), st.sampled_from(["", "\ufeff"]), SIZES, SIZES)
def test_a_list_is_what_python_reads_however_it_is_cut(
    tmp_path_factory: Any, text: str, mark: str, block: int, batch: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_bytes((mark + text).encode())
    with cut(block, batch):
        assert indexed(path) == [(str(n), row) for n, row in enumerate(json.loads(text), 1)]


@settings(max_examples=150, deadline=None)
@given(list_texts().filter(is_unicode), st.data(), SIZES, SIZES)
def test_a_list_that_is_cut_off_or_continued_is_refused_at_pythons_line_and_column(
    tmp_path_factory: Any, text: str, data: Any, block: int, batch: int
) -> None:
    opening = text.index("[") + 1
    text = text[: data.draw(st.integers(opening, max(opening, len(text.rstrip()) - 1)))]
    text += data.draw(st.sampled_from(["", "x", "]]", "] [", ",]"]))
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        line, words = error.lineno, f"({error.msg} at column {error.colno})"
    else:
        return
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_bytes(text.encode())
    with cut(block, batch), pytest.raises(DataError) as caught:
        list(FileIndex(str(path)).scan())
    assert str(caught.value) == f"{path}:{line}: expected one JSON object per line, or a list of objects {words}"


@pytest.mark.parametrize(
    "text", ["[1, 2", "[1 2]", "[1,]", "[1] 2", "[", "[] 1", '["a]', '[{"a": 1}, {"b": }]', '[1, "\\ud800"]']
)
def test_a_list_that_is_none_is_refused_in_pythons_words(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(
        DataError, match=rf"{path}:1: (expected one JSON object per line, or a list|.* is half of a surrogate pair)"
    ):
        list(FileIndex(str(path)).scan())


def test_a_list_that_ends_within_a_letter_is_refused_by_its_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes('[{"prompt": "é'.encode()[:-1])
    with pytest.raises(DataError, match=rf"{path}: expected UTF-8 text \(unexpected end of data at byte 13\)"):
        Json(str(path))("train")


@pytest.mark.parametrize(
    ("element", "words"),
    [
        ('{"prompt": "\\ud800"}', "'prompt': '\\\\ud800' is half of a surrogate pair"),
        ('{"prompt": "\\udE00\\ud83d"}', "is half of a surrogate pair"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("1" * 5000, "Exceeds the limit"),
        ('{"prompt": }', "Expecting value at column 12"),
        ('{"prompt": "b"} {', "Expecting ',' delimiter at column 17"),
    ],
)
def test_an_element_that_python_refuses_is_named_by_its_line(tmp_path: Path, element: str, words: str) -> None:
    """Elements before it are read if no more are asked for."""
    good = '{"prompt": "a"},\n'
    path = tmp_path / "rows.json"
    path.write_text("[\n" + good * 20 + element + ",\n" + good * 20 + "{}]")
    with pytest.raises(DataError, match=rf"{path}:22: .*{words}"):
        Json(str(path))("train")
    assert len(Json(str(path), limit=20)("train")) == 20


def test_letters_that_are_escaped_as_pairs_are_read_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} 😀", "response": "\\ud83d é"} for n in range(5)]
    path = tmp_path / "rows.json"
    for escape in (True, False):
        path.write_text(json.dumps(rows, ensure_ascii=escape))
        assert indexed(path) == [(str(n), row) for n, row in enumerate(rows, 1)]


def test_rows_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a"}, {"prompt": "b"}, {"prompt": 1}, x')
    rows = Json(str(path), limit=2)("train")
    assert [row.prompt for row in rows] == ["a", "b"]
    with pytest.raises(DataError, match=rf"{path}:1: expected one JSON object per line"):
        Json(str(path), limit=4)("train")


def test_a_row_that_lacks_a_column_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a"}] * 700 + [{"text": "b"}] + [{"prompt": "a"}] * 700))
    with pytest.raises(DataError, match=rf"{path}:701: "):
        Json(str(path))("train")


def test_an_element_larger_than_a_block_is_read(tmp_path: Path) -> None:
    """Also one whose first letters are a value of their own, as those of a number."""
    rows = ["é" * 3_000_000, int("1" * 4000), {"prompt": "a"}, "x" * 2_000_000, 7]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert [row for _, row in indexed(path)] == rows


def test_memory_holds_a_few_bytes_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"{n} " + "x" * 80, "response": "y" * 40} for n in range(40_000)], indent=1))
    Json(str(path), limit=1)("train")
    tracemalloc.start()
    try:
        rows = Json(str(path), heldout=0.1)("train")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 36_000
    assert kept < 40 * 40_000  # 12 of the index, 10 of the choice, and room that arrays grow into
    assert peak < path.stat().st_size
