"""Benchmark of data preparation; a run must never wait for rows: `python benchmarks/data.py [MODEL]`.

Rows are made here: preference pairs of about 100 tokens a side, with the chat template of MODEL (the byte-level tokenizer of
`tiny` by default: more tokens per row than any real one has). Printed are rows/s of reading and checking a file, and of
templating and tokenizing in this process, in two others, and out of the cache; then what an `sft` run of the tiny model
waited for data, as its own `time/data` says, when rows are read ahead and, for comparison, made when they are asked for.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from rlhf_core import Run, make_config
from rlhf_core.contract.batch import Example
from rlhf_core.contract.options import ModelOptions
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.json import Json
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.prepare import Preparer
from rlhf_core.data.stream import DrawnRows
from rlhf_core.models.loading.tokenizer import load_tokenizer

ROWS, PREPARED, BLOCK, STEPS = 20_000, 4096, 512, 15
WORDS = "the a river walks slowly over green stones and nobody in town knows why it sings at night".split()


class Lazy(Prefetcher):
    """A stream that makes its rows when they are asked for."""

    def __next__(self) -> DrawnRows:
        return next(self._stream)


class Unhurried(Run):
    """A run that waits for its rows."""

    @cached_property
    def stream(self) -> Prefetcher:
        return Lazy.for_data(
            self.data.rows, self.encoder, self.config.providers["data"], False, self.config, self.world
        )


def text(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def prepared(title: str, encoder: Encoder, data: Json, examples: Sequence[Example]) -> None:
    """Print how fast rows are prepared, the start of processes left out."""
    preparer = Preparer(encoder, online=False, data=data)
    try:
        if data.workers:
            preparer(examples[-2 * BLOCK :])
        started = time.perf_counter()
        for at in range(0, len(examples), BLOCK):
            preparer(examples[at : at + BLOCK])
        print(f"{title:<26}{len(examples) / (time.perf_counter() - started):10,.0f} rows/s", flush=True)
    finally:
        preparer.close()


def waited(title: str, kind: type[Run], path: Path, output: Path) -> None:
    """Print the time that the steps of a run waited for data."""
    data = {"use": "json", "path": str(path), "completion_key": "chosen", "limit": 2000}
    run = kind(make_config("sft", model="tiny", output=str(output), steps=STEPS, batch_size=16, data=data))
    run.train()
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]
    data_ms, step_ms = (1000 * statistics.median(step[f"time/{name}"] for step in steps) for name in ("data", "step"))
    print(f"{title:<26}{data_ms:10.1f} ms of a step of {step_ms:.0f} ms ({data_ms / step_ms:.1%})", flush=True)


def main() -> None:
    random.seed(0)
    model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.jsonl"
        rows = ({"prompt": text(20), "chosen": text(40), "rejected": text(40)} for _ in range(ROWS))
        path.write_text("\n".join(map(json.dumps, rows)))
        started = time.perf_counter()
        examples = Json(str(path))("train")
        print(f"{'read and check a file':<26}{ROWS / (time.perf_counter() - started):10,.0f} rows/s", flush=True)

        some = examples[:PREPARED]
        encoder = Encoder(load_tokenizer(model, ModelOptions()))
        prepared("tokenize, one process", encoder, Json(str(path)), some)
        prepared("tokenize, two processes", encoder, Json(str(path), workers=2), some)
        cached = Json(str(path), cache=str(folder / "cache"))
        prepared("tokenize into the cache", encoder, cached, some)
        prepared("out of the cache", encoder, cached, some)

        waited("waited, read ahead", Run, path, folder / "ahead")
        waited("waited, made when asked", Unhurried, path, folder / "asked")


if __name__ == "__main__":
    main()
