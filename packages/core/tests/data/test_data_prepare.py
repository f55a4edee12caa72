"""Rows are the same however they were prepared: here, in other processes, out of a cache, ahead of the loop."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.cache import RowCache
from rlhf_core.data.encoder import Encoder, Encoding
from rlhf_core.data.json import Json
from rlhf_core.data.prefetch import DEPTH, Prefetcher
from rlhf_core.data.prepare import Preparer
from rlhf_core.data.rows import TokenizedCompletion, TokenizedRow
from rlhf_core.data.stream import Stream
from rlhf_core.errors import DataError, UsageError
from rlhf_core.models.loading.tokenizer import load_tokenizer

TURNS = ({"role": "assistant", "content": "1"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "2"})
EXAMPLES = [
    Example("What is red?", ("A colour.", "Grün 🙂"), label="x", meta={"id": 1}, origin="rows:1"),
    Example(({"role": "user", "content": "Count."},), (TURNS,), origin="rows:2"),
    Example("", ("Once upon a time.",), origin="rows:3"),
    Example("Which tool?", ("None.",), meta={"tools": [{"type": "function", "function": {"name": "f"}}]}),
]
BAD = Example("Hi", (({"role": "user", "content": "?"},),), origin="rows:9")


def encoder(**options: Any) -> Encoder:
    return Encoder(load_tokenizer("tiny", ModelOptions()), **options)


def data(**options: Any) -> Json:
    return Json("rows.jsonl", **options)


def prepared(online: bool = False, **options: Any) -> list[Any]:
    """The rows of EXAMPLES, and the preparer is closed."""
    preparer = Preparer(encoder(), online, data(**options))
    try:
        return preparer(EXAMPLES)
    finally:
        preparer.close()


# ----------------------------------------------------------------------------------------------------------------------
# cache
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
def test_a_cached_row_is_the_row(tmp_path: Path, online: bool, monkeypatch: Any) -> None:
    plain = encoder()
    expected = [plain.prompt_row(e) if online else plain.row(e) for e in EXAMPLES]
    assert prepared(online, cache=str(tmp_path)) == expected
    monkeypatch.setattr(Encoder, "row", None)
    monkeypatch.setattr(Encoder, "prompt_row", None)  # nothing is tokenized again
    assert prepared(online, cache=str(tmp_path)) == expected
    with pytest.raises(TypeError):
        prepared(not online, cache=str(tmp_path))  # prompts alone are other rows


def test_a_prompt_is_no_row_to_train_on_whatever_the_cache_has_of_it(tmp_path: Path) -> None:
    asked = Example("What is red?", origin="rows:1")
    for online, cache in ((True, ""), (True, str(tmp_path)), (False, str(tmp_path)), (False, "")):
        preparer = Preparer(encoder(), online, data(cache=cache))
        (row,) = preparer([asked])
        preparer.close()
        assert isinstance(row, TokenizedRow if online else DataError)
    assert str(row).startswith(
        "rows:1: no completion to train on; pass data.completion_key if there is one (preferences"
    )


def test_the_limits_of_a_run_are_not_in_the_cache(tmp_path: Path) -> None:
    assert all(prepared(cache=str(tmp_path)))
    short = Preparer(encoder(max_prompt_tokens=3), False, data(cache=str(tmp_path)))
    assert [row is None for row in short(EXAMPLES)] == [True, True, False, True]
    short.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_whatever_decides_the_tokens_names_another_file(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    words = [encoder().fingerprint()]
    for text in ("{{ messages[0].content }}", "{{ messages[0].content }}.", "{{ strftime_now('%Y') }}"):
        template.write_text(text)
        words.append(encoder(encoding=Encoding(template_file=str(template))).fingerprint())
    words.append(encoder(encoding=Encoding(template="raw")).fingerprint())
    words.append(encoder(encoding=Encoding(input_template="Q: {}")).fingerprint())
    other = load_tokenizer("tiny", ModelOptions())
    other.add_tokens(["colour"])
    words.append(Encoder(other).fingerprint())
    assert len(set(words)) == len(words)
    same = encoder(max_prompt_tokens=3, encoding=Encoding(max_tokens=7), preview=2)
    assert same.fingerprint() == words[0]


def test_a_template_that_asks_for_the_day_is_good_for_the_day(tmp_path: Path, monkeypatch: Any) -> None:
    import datetime

    import rlhf_core.data.render as render

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return datetime.date(2100, 1, 1)

    (tmp_path / "t.jinja").write_text("{{ strftime_now('%d') }}{{ messages[0].content }}")
    dated = encoder(encoding=Encoding(template_file=str(tmp_path / "t.jinja")))
    plain = encoder()
    today = dated.fingerprint(), plain.fingerprint()
    monkeypatch.setattr(render, "date", Tomorrow)
    assert dated.fingerprint() != today[0]
    assert plain.fingerprint() == today[1]


def test_a_damaged_row_is_made_again_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    expected = prepared(cache=str(tmp_path))
    (path,) = tmp_path.iterdir()
    with sqlite3.connect(path) as file:
        file.execute("UPDATE rows SET row = CAST(substr(row, 1, length(row) - 5) || 'xxxxx' AS BLOB)")
    file.close()
    assert prepared(cache=str(tmp_path)) == expected
    path.write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(UsageError, match=r"cache: .*\.sqlite cannot be used \(file is not a database\); remove"):
        prepared(cache=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cache .*file.* name a writable folder"):
        prepared(cache=str(tmp_path / "file" / "inside"))


def test_a_row_under_another_key_counts_as_absent(tmp_path: Path) -> None:
    """Check the answer of a damaged index."""
    row = TokenizedRow("x", [1, 2**32 - 1], (TokenizedCompletion("é", [], []), TokenizedCompletion("", [3], [True])), 1)
    cache = RowCache(str(tmp_path), "f")
    cache.put({b"a" * 16: row, b"b" * 16: row})
    assert cache.get([b"a" * 16]) == {b"a" * 16: row}  # one that waits
    cache.close()
    with sqlite3.connect(tmp_path / "rows-f.sqlite") as file:
        file.execute("UPDATE rows SET row = (SELECT row FROM rows WHERE key = ?) WHERE key = ?", (b"a" * 16, b"b" * 16))
    file.close()
    assert cache.get([b"a" * 16, b"b" * 16]) == {b"a" * 16: row}
    cache.close()


WRITER = """
import sys
from rlhf_core.data import cache as module
from rlhf_core.data.rows import TokenizedCompletion, TokenizedRow
module.PAUSE = 0.02
cache = module.RowCache(sys.argv[1], "f")
print("open", flush=True)
for start in range(0, 100_000, 50):
    row = lambda n: TokenizedRow(str(n), [n], (TokenizedCompletion(str(n), [n, n], [True, False]),))
    cache.put({f"{n:016d}".encode(): row(n) for n in range(start, start + 50)})
"""


def test_runs_may_share_a_cache_and_be_killed_while_they_write(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
    for writer in writers:
        time.sleep(0.3)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    cache = RowCache(str(tmp_path), "f")
    keys = [f"{n:016d}".encode() for n in range(100_000)]
    found = cache.get(keys)
    assert found
    assert len(found) % 50 == 0  # whole transactions
    for key, row in found.items():
        n = int(key)
        assert row == TokenizedRow(str(n), [n], (TokenizedCompletion(str(n), [n, n], [True, False]),))
    cache.put({b"x": TokenizedRow("x", [1])})  # and it can be written
    cache.close()
    with sqlite3.connect(tmp_path / "rows-f.sqlite") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()


# ----------------------------------------------------------------------------------------------------------------------
# processes
# ----------------------------------------------------------------------------------------------------------------------


def test_processes_make_the_same_rows_and_end(tmp_path: Path) -> None:
    preparer = Preparer(encoder(), False, data(workers=2))
    plain = encoder()
    many = EXAMPLES * 40
    try:
        rows = preparer([*many, BAD])
        assert rows[:-1] == [plain.row(example) for example in many]
        assert isinstance(rows[-1], DataError)
        assert str(rows[-1]) == "rows:9: no assistant turn to train on"
    finally:
        preparer.close()
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    assert not children.exists() or "rlhf_core.util.worker_child" not in str(
        [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children.read_text().split()]
    )


# ----------------------------------------------------------------------------------------------------------------------
# ahead of the loop
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened() -> Iterator[Any]:
    streams: list[Prefetcher] = []
    before = set(threading.enumerate())  # a test before this one may have been cut off in the middle of a run

    def ahead(stream: Stream) -> Prefetcher:
        streams.append(Prefetcher(stream))
        return streams[-1]

    yield ahead
    for stream in streams:
        stream.close()
    assert "data" not in [thread.name for thread in threading.enumerate() if thread not in before]


ROWS = [Example(str(i)) for i in range(10)]


def test_reading_ahead_changes_neither_batches_nor_positions(opened: Any) -> None:
    plain, ahead = Stream(ROWS, 4, seed=2), opened(Stream(ROWS, 4, seed=2))
    for _ in range(9):
        assert ahead.state_dict() == plain.state_dict()
        assert next(ahead) == next(plain)
    resumed = opened(Stream(ROWS, 4, seed=2))
    resumed.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
    assert [next(resumed) for _ in range(5)] == [next(plain) for _ in range(5)]


def test_batches_are_ready_before_they_are_asked_for(opened: Any) -> None:
    made: list[int] = []

    def slow(examples: Any) -> list[Any]:
        made.append(len(examples))
        return [TokenizedRow("", [1]) for _ in examples]

    ahead = opened(Stream(ROWS, 4, prepare=slow))
    next(ahead)
    deadline = time.monotonic() + 120
    while sum(made) < 4 * (1 + DEPTH) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(made) >= 4 * (1 + DEPTH)


def test_an_error_waits_for_its_turn_and_is_raised_again(opened: Any) -> None:
    def prepare(examples: Any) -> list[Any]:
        return [DataError("rows:8: bad") if e.prompt == "7" else TokenizedRow("", [1]) for e in examples]

    plain = Stream(ROWS, 1)
    turn = [next(plain).examples[0].prompt for _ in range(10)].index("7")
    ahead = opened(Stream(ROWS, 1, prepare=prepare, block=64))
    for _ in range(turn):
        next(ahead)
    for _ in range(2):
        with pytest.raises(DataError, match="rows:8: bad"):
            next(ahead)


def test_what_is_left_out_is_said_once_and_counted(opened: Any, capsys: Any) -> None:
    def prepare(examples: Any) -> list[Any]:
        return [None if e.prompt == "3" else TokenizedRow("", [1], cut=e.prompt == "4") for e in examples]

    ahead = opened(Stream(ROWS, 9, prepare=prepare))
    for _ in range(4):
        next(ahead)
    said = capsys.readouterr().err.splitlines()
    for name, line in zip(("dropped", "truncated"), sorted(said, key=lambda line: "truncated" in line), strict=True):
        assert re.fullmatch(
            rf"rlhf-run: 1 rows of the first \d+ drawn were {name}, since they are longer than .* counts them", line
        )
    metrics = ahead.metrics()
    assert 3 < metrics.pop("data/epoch") <= 4
    assert metrics == {"data/dropped": 4, "data/truncated": 4, "data/duplicates": 0}


# ----------------------------------------------------------------------------------------------------------------------
# in a run
# ----------------------------------------------------------------------------------------------------------------------


def lines(output: Path) -> list[dict[str, Any]]:
    """The metrics of each step, without times."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "speed/", "memory/"))}
        for row in rows
    ]


def test_a_run_has_the_same_numbers_with_cache_and_processes(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("rlhf_algos", reason="the run is of an algorithm of rlhf-algos")
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {i % 9}?", "response": f"{i % 9} " * (1 + 40 * (i % 9 == 5))} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))

    def run(name: str, **options: Any) -> list[dict[str, Any]]:
        reader = {"use": "json", "path": str(path), "unique": True, "encoding": {"max_tokens": 70}, **options}
        config = make_config("sft", model="tiny", output=str(tmp_path / name), steps=3, batch_size=4, data=reader)
        Run(config).train()
        return lines(tmp_path / name)

    plain = run("plain")
    assert run("cached", cache=str(tmp_path / "cache")) == plain
    assert run("again", cache=str(tmp_path / "cache"), workers=1) == plain
    assert plain[-1]["data/duplicates"] == 3
    assert plain[-1]["data/dropped"] == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "rlhf-run:" in line]
    assert said[0] == "rlhf-run: 3 rows were duplicates and were skipped (data.unique); data/duplicates counts them"
    assert len(said) == 6  # two lines a run
