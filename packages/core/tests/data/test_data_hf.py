"""Rows from the `datasets` library: the same examples as the original rows, alone and mixed."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.contract.batch import Example
from rlhf_core.data import mixture
from rlhf_core.data.hf import HuggingFaceData
from rlhf_core.data.json import Json
from rlhf_core.data.stream import Stream
from rlhf_core.errors import DataError, UsageError

datasets = pytest.importorskip("datasets")
pytestmark = [  # the library leaves open files to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Any) -> Iterator[None]:
    """Nothing is left in, or taken from, the user's cache, and no open file is left to the next test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    gc.collect()


def saved(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> str:
    """The rows, stored as `kind`; returns what --data.path takes."""
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    path = str(folder / f"rows.{kind}")
    match kind:
        case "json" | "jsonl":
            Path(path).write_text("\n".join(map(json.dumps, rows)))
        case "csv":
            table.to_csv(path)
        case "tsv":
            table.to_csv(path, sep="\t")
        case "parquet":
            table.to_parquet(path)
        case "saved":
            table.save_to_disk(path)
        case "splits":
            datasets.DatasetDict(train=table, test=table.select([0, 1])).save_to_disk(path)
        case "json@":
            (folder / "inside").mkdir()
            (folder / "inside" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
            path = f"json@{folder / 'inside'}"
        case "folder":
            (folder / "plain").mkdir()
            table.to_parquet(str(folder / "plain" / "train.parquet"))
            path = str(folder / "plain")
        case "arrow":
            table.save_to_disk(str(folder / "one"))
            path = str(next((folder / "one").glob("*.arrow")))
    return path


KINDS = ["json", "jsonl", "csv", "tsv", "parquet", "arrow", "saved", "splits", "folder", "json@"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, kind: str, streaming: bool) -> None:
    examples = list(HuggingFaceData(saved(tmp_path, kind), streaming=streaming)("train"))
    assert [(e.prompt, e.completions) for e in examples] == [(row["question"], (row["answer"],)) for row in ROWS]
    assert examples[3].origin.endswith(":4")


def test_the_two_readers_agree_on_chats_with_absent_keys(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}
    other = {"role": "assistant", "content": "", "tool_calls": [{"name": "sum", "arguments": {"of": [1, 2]}}]}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "c"}, call, {"role": "tool", "content": "d"}]},
        {"messages": [{"role": "user", "content": "e"}, other, {"role": "tool", "content": "3"}]},
    ]
    rows = [
        row | {"tools": [{"name": "clock", "parameters": {"zone" if i else "city": "text"}}]}
        for i, row in enumerate(rows)
    ]
    path = saved(tmp_path, "parquet", rows)
    read, expected = HuggingFaceData(path)("train"), Json(saved(tmp_path, "jsonl", rows))("train")
    assert [(e.prompt, e.completions, e.meta) for e in read] == [(e.prompt, e.completions, e.meta) for e in expected]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_goes_to_the_library_with_its_configuration(monkeypatch: Any, streaming: bool) -> None:
    asked: list[dict[str, Any]] = []

    def load(**words: Any) -> Any:
        asked.append(words)
        table = datasets.Dataset.from_list(ROWS)
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(HuggingFaceData("org/set:main, other", split="train[:9]", streaming=streaming)("train"))
    assert [row.meta["datasource"] for row in rows] == ["org/set:main"] * 6 + ["other"] * 6
    same = {"split": "train[:9]", "streaming": streaming}
    assert asked == [{"path": "org/set", "name": "main", **same}, {"path": "other", **same}]


def test_splits_and_their_slices_have_names(tmp_path: Path) -> None:
    path = saved(tmp_path, "splits")
    data = HuggingFaceData(path, heldout_split="test")
    assert [len(list(data(split))) for split in ("train", "heldout")] == [6, 2]
    other = HuggingFaceData(saved(tmp_path / "other", "jsonl"), heldout_path=path)
    assert len(list(other("heldout"))) == 6, "the split train of another set"
    assert len(list(replace(other, heldout_split="test")("heldout"))) == 2
    with pytest.raises(UsageError, match="there is no split 'dev'; choose one of train, test"):
        HuggingFaceData(path, split="dev")("train")
    assert len(list(HuggingFaceData(saved(tmp_path, "parquet"), split="train[:50%]")("train"))) == 3


def test_held_out_rows_are_those_of_the_json_reader(tmp_path: Path) -> None:
    path = saved(tmp_path, "jsonl")
    for split in ("train", "heldout"):
        ours = [example.prompt for example in HuggingFaceData(path, heldout=2)(split)]
        assert ours == [example.prompt for example in Json(path, heldout=2)(split)]


@pytest.mark.parametrize("streaming", [False, True])
def test_sets_come_one_after_another_or_mixed_and_say_where_from(tmp_path: Path, streaming: bool) -> None:
    one = saved(tmp_path / "one", "jsonl", [{"prompt": f"x{i}"} for i in range(3)])
    two = saved(tmp_path / "two", "csv", [{"question": f"y{i}"} for i in range(9)])
    joined = list(HuggingFaceData(f"{one}, {two}", streaming=streaming)("train"))
    assert [e.prompt for e in joined] == [*(f"x{i}" for i in range(3)), *(f"y{i}" for i in range(9))]
    assert [e.meta["datasource"] for e in joined] == [one] * 3 + [two] * 9
    mixed = list(HuggingFaceData(f"{one},{two}", shares=(0.5, 0.5), streaming=streaming)("train"))
    assert {e.prompt for e in mixed} == {e.prompt for e in joined}
    assert len(mixed) > 12  # x came again while y lasted
    capped = list(HuggingFaceData(f"{one},{two}", limit_each=2, limit=3, streaming=streaming)("train"))
    assert [e.prompt for e in capped] == ["x0", "x1", "y0"]


def test_a_streamed_set_is_continued_at_its_position(tmp_path: Path) -> None:
    rows = HuggingFaceData(saved(tmp_path, "jsonl"), streaming=True)("train")
    whole, resumed = Stream(rows, 4), Stream(rows, 4)
    next(whole)
    resumed.load_state_dict(whole.state_dict())
    assert next(resumed) == next(whole)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere.csv", {}, "path nowhere.csv: there is no such file"),
        ("a,b", {"shares": (1.0,)}, "shares has 1 numbers, but"),
        ("ROWS,ROWS", {"shares": (1.0, 0.0)}, "shares 1 0: each should be above 0"),
        ("ROWS", {"split": "dev"}, "split 'dev': "),
        ("ROWS", {"heldout": 0.5, "streaming": True}, "use heldout_split to stream"),
        ("ROWS", {"prompt_key": "x"}, "rows.jsonl:1: expected a column 'x'; found only question, answer"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, path: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        HuggingFaceData(path.replace("ROWS", saved(tmp_path, "jsonl")), **options)("train")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_held_out_and_nulls_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, "jsonl", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(UsageError, match="no rows are held out"):
        HuggingFaceData(path)("heldout")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'prompt' should be text or a chat, not null"):
        list(HuggingFaceData(path)("train"))


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 1)), min_size=1, max_size=4), st.integers(0, 99))
def test_a_mixture_ends_when_its_last_set_is_used_up(sets: list[tuple[int, float]], seed: int) -> None:
    lengths, shares = [n for n, _ in sets], [share for _, share in sets]
    set_N, row_N = mixture.order(lengths, shares, seed)
    count = Counter(set_N.tolist())
    assert all(count[number] >= length for number, length in enumerate(lengths))
    assert count[int(set_N[-1])] == lengths[set_N[-1]]  # the last draw used up the last set, and only then
    for number, length in enumerate(lengths):  # rows of a set come in turn, again and again
        assert row_N[set_N == number].tolist() == [i % length for i in range(count[number])]


def test_shares_are_probabilities() -> None:
    set_N, _ = mixture.order([3000, 1000], [3, 1], seed=1)
    assert (set_N[:2000] == 0).mean() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 2000) ** 0.5)  # 4 standard errors


@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 99))
def test_streamed_sets_are_drawn_as_known_ones_are(lengths: list[int], seed: int) -> None:
    sets = [[Example(f"{number}/{i}") for i in range(length)] for number, length in enumerate(lengths)]
    shares = [1.0] * len(sets)
    known = list(mixture.PickedRows(sets, *mixture.order(lengths, shares, seed)))
    streamed: Iterator[Example] = (row for _, row in mixture.SetsReader(sets, shares, seed))
    assert [row for row, _ in zip(streamed, known)] == known
