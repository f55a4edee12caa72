"""Opening data, holding rows out, and continuing a stream, at growing numbers of rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_core.data.hf import HuggingFaceData
from rlhf_core.data.json import Json
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.stream import Stream
from scaling_curves.curve import Cost, Measured, Ratio, Series, cost_of, curve, in_process

SIZES = (10_000, 100_000, 1_000_000)
TINY = (100, 300)
SHARDS = 100
"""Files of the streamed set."""


@contextmanager
def written(rows: int, shards: int = 1) -> Iterator[Path]:
    """A folder with so many rows of 136 bytes in files of equal size."""
    with tempfile.TemporaryDirectory() as name:
        for shard in range(shards):
            with (Path(name) / f"rows-{shard:03d}.jsonl").open("w") as file:
                for number in range(shard * rows // shards, (shard + 1) * rows // shards):
                    prompt = f"question {number:07d} about a thing that nobody knows"
                    file.write(json.dumps({"prompt": prompt, "response": f"answer {number:07d} " + "a" * 39}) + "\n")
        yield Path(name)


def as_list(lines: Path) -> Path:
    """Write the rows of a file of lines as one list, as `json.dump` does; return its path."""
    path = lines.with_suffix(".json")
    with lines.open() as file, path.open("w") as to:
        to.write("[" + next(file)[:-1])
        to.writelines(f", {line[:-1]}" for line in file)
        to.write("]")
    return path


def parse_lines(path: str) -> None:
    """One pass over the bytes: parse every line, keep none."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            json.loads(line)


def parse_list(path: str) -> None:
    """One pass over the bytes of a list: parse every element, keep none."""
    text, at, decoder = Path(path).read_text(encoding="utf-8"), 1, json.JSONDecoder()
    while at < len(text):
        _, at = decoder.raw_decode(text, at)
        at += 2


def cost_of_json(path: str, one_pass: Callable[[str], None]) -> tuple[Cost, Cost, Cost, Cost]:
    """Costs of a pass, of opening the file, of opening it with held-out rows, and of reading these, each alone."""
    Json(path, limit=1)("train")  # imports
    opened = cost_of(Json(path), "train")
    data = Json(path, heldout=0.1)
    train: list[Any] = []
    held = cost_of(lambda: train.append(data("train")))
    heldout = cost_of(lambda: list(data("heldout")[:64]))
    return cost_of(one_pass, path), opened, held, heldout


@curve(
    "json", "opening a JSON file of 136-byte rows, its memory, and held-out rows: rows on lines, and one list of rows"
)
def open_json(quick: bool) -> Measured:
    """Each file is opened in a fresh process."""
    series, ratios = list[Series](), list[Ratio]()
    for kind, one_pass in (("lines", parse_lines), ("list", parse_list)):
        seconds, memory = [], []
        for size in TINY if quick else SIZES:
            with written(size) as folder:
                path = folder / "rows-000.jsonl"
                if kind == "list":
                    path = as_list(path)
                bytes_ = path.stat().st_size
                bare, opened, held, heldout = in_process(cost_of_json, str(path), one_pass)
            seconds.append((size, opened.cpu))
            memory.append((size, opened.memory))
            if size == SIZES[-1]:
                ratios += [
                    Ratio(f"1e6 rows, {kind}: start / one pass that parses", opened.cpu / bare.cpu, 1.5),
                    Ratio(f"1e6 rows, {kind}: memory / file", opened.memory / bytes_, 1.5),
                    Ratio(f"1e6 rows, {kind}: held-out rows, CPU / start", heldout.cpu / held.cpu, 0.05),
                    Ratio(f"1e6 rows, {kind}: held-out rows, memory / file", heldout.memory / bytes_, 0.05),
                ]
        series += [Series(f"{kind}: start", "rows", "s", seconds), Series(f"{kind}: memory", "rows", "B", memory)]
    return Measured(series, ratios)


def cost_of_resume(path: str, rows: int, resume: bool) -> tuple[Cost, str]:
    """The cost of opening a set and drawing a batch, at its start or after nine tenths of it."""
    next(iter(HuggingFaceData(str(Path(path) / "rows-000.jsonl"), streaming=True)("train")))  # imports
    data = HuggingFaceData(f"json@{path}", streaming=True)
    position = None
    if resume:
        stream = Prefetcher(Stream(data("train"), 8, buffer=data.shuffle_buffer))
        for _ in range(rows * 9 // 80):
            next(stream)
        position = json.loads(json.dumps(stream.with_ahead(stream.state_dict())))
        stream.close()
    found = []

    def first() -> None:
        stream = Stream(data("train"), 8, buffer=data.shuffle_buffer)
        if position is not None:
            stream.load_state_dict(position)
        found.append(str(next(stream).uids))

    return cost_of(first), found[0]


@curve("resume", f"continuing a streamed set at nine tenths, {SHARDS} files and one file")
def resume(quick: bool) -> Measured:
    """The first batch after opening the set, at its start and at nine tenths."""
    series, ratios = [], list[Ratio]()
    for shards in (SHARDS, 1) if not quick else (4,):
        begun, continued = [], []
        for size in (2000,) if quick else SIZES:
            with written(size, shards) as folder:
                start, _ = in_process(cost_of_resume, str(folder), size, False)
                again, _ = in_process(cost_of_resume, str(folder), size, True)
            begun.append((size, start.cpu))
            continued.append((size, again.cpu))
        series += [
            Series(f"first batch, {shards} files", "rows", "s", begun),
            Series(f"batch at 90 %, {shards} files", "rows", "s", continued),
        ]
        if not quick and shards == SHARDS:
            ratios.append(Ratio("1e6 rows: batch at 90 % / first batch", continued[-1][1] / begun[-1][1], 2))
    return Measured(series, ratios)
