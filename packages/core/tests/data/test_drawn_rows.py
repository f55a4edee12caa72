"""Readers and samplers that draw from the global random generators: the same rows from the same seed, whatever else draws."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rlhf_core.contract.batch import Example
from rlhf_core.contract.providers import Data
from rlhf_core.contract.selection import Sampler
from rlhf_core.data.memory_rows import MemoryRows
from rlhf_core.data.prefetch import Prefetcher
from rlhf_core.data.stream import Stream
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.util.random_states import seed_libraries

COUNT = 7


def draw() -> float:
    return random.random() + float(np.random.rand()) + float(torch.rand(()))


class Table(Sequence[Example]):
    """Rows that are made when they are asked for, each with something drawn in it."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: Any) -> Any:
        return Example(f"{index} {draw()}")


class Lines(Iterable[Example]):
    """Rows without a length, in a random order."""

    def __iter__(self) -> Iterator[Example]:
        order = list(range(COUNT))
        random.shuffle(order)
        for number in order:
            yield Example(f"{number} {draw()}")


@dataclass(frozen=True)
class Drawing(Sampler):
    """Numbers that are drawn."""

    reacts: ClassVar[bool] = False

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            yield random.randrange(rows)


CASES: Mapping[str, Mapping[str, Any]] = {
    "a table": {"examples": Table()},
    "a stream": {"examples": Lines()},
    "a stream in a buffer": {"examples": Lines(), "buffer": 3},
    "a sampler": {"examples": [Example(str(number)) for number in range(50)], "sampler": Drawing()},
    "a table and a sampler": {"examples": Table(), "sampler": Drawing()},
}
BATCHES = 8
"""More than two epochs of two rows each."""


def opened(case: str, seed: int = 1, **ranks: int) -> Prefetcher:
    return Prefetcher(Stream(batch_size=2, seed=seed, seeds_rows=True, **CASES[case], **ranks), ahead=False)


def texts(rows: Prefetcher, batches: int, disturbed: bool = False) -> list[str]:
    """The prompts of some batches, between which other code may draw."""
    found = []
    for _ in range(batches):
        found += [str(example.prompt) for example in next(rows).examples]
        if disturbed:
            draw()
    return found


@pytest.mark.parametrize("case", CASES)
def test_rows_follow_from_the_seed_and_their_number_alone(case: str) -> None:
    seed_libraries(5)
    whole = texts(opened(case), BATCHES)
    assert texts(opened(case), BATCHES, disturbed=True) == whole
    assert texts(opened(case, seed=2), BATCHES) != whole
    begun = opened(case)
    texts(begun, 3)
    resumed = opened(case)
    resumed.load_state_dict(begun.state_dict())
    assert texts(resumed, BATCHES - 3) == whole[6:]
    assert len(set(whole)) > COUNT, "each epoch draws anew"


@pytest.mark.parametrize("case", CASES)
def test_ranks_read_the_rows_of_one_process_though_each_reads_others(case: str) -> None:
    whole = texts(opened(case), BATCHES)
    shares = [texts(opened(case, rank=rank, world_size=2), BATCHES) for rank in range(2)]
    assert [set(pair) for pair in zip(*shares, strict=True)] == [{*whole[i : i + 2]} for i in range(0, 2 * BATCHES, 2)]


@pytest.mark.parametrize("case", CASES)
def test_reading_leaves_the_generators_to_the_code_of_the_loop(case: str) -> None:
    seed_libraries(5)
    expected = [draw() for _ in range(4)]
    seed_libraries(5)
    rows = opened(case)
    assert [(draw(), next(rows))[0] for _ in range(4)] == expected


@dataclass(frozen=True)
class Drawn(Data):
    """Rows with something drawn in them."""

    stream: bool = False

    def __call__(self, split: str) -> Iterable[Example]:
        return Lines() if self.stream else Table()


@pytest.mark.parametrize("stream", [True, False])
def test_a_resumed_run_reads_what_the_whole_one_read(stream: bool, tmp_path: Path) -> None:
    def train(output: str, steps: int, **more: Any) -> bytes:
        options = {"steps": steps, "reward": "length", "data": Drawn(stream), "save_every": 1, **more}
        tiny_run(tmp_path / output, **options).train()
        return (tmp_path / output / "samples.jsonl").read_bytes()

    whole = train("whole", 4)
    train("parts", 2)
    assert train("parts", 4, resume=True) == whole


def test_only_rows_that_draw_nothing_are_read_in_the_background() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "a"}])
    assert MemoryRows(rows=[{"prompt": "a"}]).runs_ahead and MemoryRows(rows=table).runs_ahead
    assert not MemoryRows(rows=table.with_transform(lambda rows: rows)).runs_ahead
    assert not MemoryRows(rows=table.to_iterable_dataset()).runs_ahead
    assert not Drawn().runs_ahead


class Torn(Table):
    """A table whose rows cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        raise OSError("torn")


def test_an_error_of_a_reader_is_raised_each_time_the_loop_asks() -> None:
    rows = Prefetcher(Stream(Torn(), 2, seeds_rows=True), ahead=False)
    for _ in range(2):
        with pytest.raises(OSError, match="torn"):
            next(rows)
