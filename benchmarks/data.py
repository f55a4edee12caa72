"""How fast rows become batches, and the share of a training step that waits for them: `python benchmarks/data.py`.

Rows are made here: preference pairs of about 200 tokens a side, read with the byte-level tokenizer's chat template (more
tokens a row than any real tokenizer has, so the slow case). Printed are rows/s of reading and checking a file, of drawing
and encoding batches, and the share of the time of an `sft` run of the tiny model that goes to data.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from rlhf_core import Run, make_config
from rlhf_core.data.json import Json
from rlhf_core.data.stream import Stream
from rlhf_core.encode import Encoder
from rlhf_core.models.load import load_tokenizer
from rlhf_core.options import ModelOptions
from rlhf_core.types import Batch, Example

ROWS, BATCH, BATCHES = 20_000, 64, 20
WORDS = "the a river walks slowly over green stones and nobody in town knows why it sings at night".split()


class Timed(Run):
    """A run that knows how long it waited for data."""

    waited = 0.0

    def next_rows(self) -> tuple[list[Example], list[int]]:
        started = time.perf_counter()
        rows = super().next_rows()
        self.waited += time.perf_counter() - started
        return rows

    def read(self, rows: tuple[list[Example], list[int]]) -> Batch:
        started = time.perf_counter()
        batch = super().read(rows)
        self.waited += time.perf_counter() - started
        return batch


def text(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def main() -> None:
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = ({"prompt": text(20), "chosen": text(40), "rejected": text(40)} for _ in range(ROWS))
        path.write_text("\n".join(map(json.dumps, rows)))
        started = time.perf_counter()
        examples = Json(str(path))("train")
        print(f"read and check a file   {ROWS / (time.perf_counter() - started):10,.0f} rows/s")

        encoder = Encoder(load_tokenizer("tiny", ModelOptions()))
        stream = Stream(examples, BATCH, keep=encoder.fits)
        times = [time.perf_counter()]
        for _ in range(BATCHES):
            encoder.batch(*next(stream))
            times.append(time.perf_counter())
        seconds = sorted(after - before for before, after in pairwise(times))
        print(f"draw and encode pairs   {BATCH / seconds[BATCHES // 2]:10,.0f} rows/s")

        output = str(Path(folder) / "run")
        config = make_config(
            "sft",
            model="tiny",
            output=output,
            steps=10,
            batch_size=16,
            data={"use": "json", "path": str(path), "completion_key": "chosen"},
        )
        run = Timed(config)
        started = time.perf_counter()
        run.train()
        share = run.waited / (time.perf_counter() - started)
        print(f"share of sft on data    {share:10.1%} (tiny model; a real one computes far longer)")


if __name__ == "__main__":
    main()
