"""Batches made ready while the loop works: a thread draws from the stream a little ahead.

It draws a batch more whenever the loop takes one. If the sampler reacts to scores, its `lookahead` is the number drawn
ahead. An update waits until these are drawn, so that the order depends on no timing; a checkpoint holds their numbers.

Ranks that share a batch agree in the loop on which rows are usable, since collective operations have one order: the thread
then makes chunks of rows, which the loop puts together into batches. If rows depend on scores or on a reader's state, nothing
can be drawn before that, and each rank prepares its share when the loop asks for it.

Only what draws from no global random generator is read by the thread (`Data.runs_ahead`, `Sampler.runs_ahead`, lists of rows).
Whatever may draw from one is read in the loop, when it is due, and leaves the generators as they were.

The position is that of the last batch taken, never of those made ahead, so that a resumed run continues exactly there. What
goes wrong while reading ahead is raised when the loop gets to it. Rows that are left out or cut are counted in
`data/dropped` and `data/truncated` and logged once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_core.data.mixture import count_duplicates
from rlhf_core.data.prepare import Preparer
from rlhf_core.data.read_ahead import InPlace, ReadAhead, Supply
from rlhf_core.data.reading import Place
from rlhf_core.data.shuffling import SHUFFLED, can_read_ahead
from rlhf_core.data.stream import READING, DrawnBatch, DrawnRows, Stream, is_indexed
from rlhf_core.errors import advice, run_option
from rlhf_core.lazy import torch
from rlhf_core.option_text import OptionNames
from rlhf_core.util.messages import log
from rlhf_core.util.random_states import drawn_apart

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.providers import Data
    from rlhf_core.data.chunks import Chunk
    from rlhf_core.data.encoder import Encoder

__all__ = ["Prefetcher"]

DEPTH = 2
"""Batches that wait for the loop, where rows do not depend on scores."""
AHEAD = "ahead"
"""Key in a position of the data: the batches that are drawn and not taken."""


class _Batch(NamedTuple):
    """A batch that waits for the loop."""

    drawn: DrawnBatch
    position: dict[str, Any]
    """position of the data after it"""


class Prefetcher:
    """A stream, read ahead by a separate thread from the first batch on.

    Args:
        stream: what to read; from then on only through here.
        close: called at the end.
        names: of the user's options, for messages.
        update: takes in what rows earned, if the stream's sampler reacts.
        ahead: read in a thread; otherwise in the loop.
    """

    def __init__(
        self,
        stream: Stream,
        close: Callable[[], None] | None = None,
        names: OptionNames | None = None,
        update: Callable[[Tensor, Tensor], None] | None = None,
        ahead: bool = True,
    ) -> None:
        self._stream, self._close, self._names, self._update = stream, close, names or OptionNames(), update
        self._state = stream.state_dict()
        self._again: list[Mapping[str, Any]] = []
        """batches that a checkpoint had drawn ahead"""
        lookahead = stream.sampler.lookahead if stream.sampler.reacts else DEPTH
        self._batches: Supply[_Batch] = ReadAhead(self._draw, lookahead)
        self._chunks: Supply[Chunk] | None = None
        if not ahead:
            self._batches = InPlace(self._draw_apart, lookahead if stream.sampler.reacts else 0)
        elif stream.ranks > 1 and stream.exact:
            self._batches = InPlace(self._draw, lookahead if stream.sampler.reacts else 0)
        elif stream.ranks > 1:
            self._batches, self._chunks = InPlace(self._draw, 0), ReadAhead(stream.chunk, 1)
            stream.pull = self._chunks.take
        self._reported: set[str] = set()

    @classmethod
    def for_data(
        cls,
        rows: Iterable[Example],
        encoder: Encoder,
        data: Data,
        online: bool,
        config: RunConfig,
        world: World,
        readers: Callable[[], Mapping[str, Any]] | None = None,
        sampler: Any = None,
    ) -> Prefetcher:
        """The rows of the provider `data`, prepared for this rank; `readers` as `Stream` takes it, `sampler` is an engine."""
        preparer = Preparer(encoder, online, data)
        order = config.providers.get("sampler", SHUFFLED)
        ahead = order.runs_ahead and can_read_ahead(data, rows)
        stream = Stream(
            rows,
            config.batch_size,
            config.seed,
            world.rank,
            world.size,
            prepare=preparer,
            block=preparer.block,
            buffer=data.shuffle_buffer,
            readers=readers,
            sampler=order,
            engine=sampler,
            add_up=partial(_add_up, world),
            seeds_rows=not ahead,
            reader=f"data {type(data).__qualname__} of {type(data).__module__}",
        )
        return cls(stream, preparer.close, config.option_names, sampler.update if order.reacts else None, ahead)

    def __next__(self) -> DrawnRows:
        batch = self._batches.take()
        self._state = batch.position
        self._say()
        return batch.drawn.rows

    @property
    def reacts(self) -> bool:
        """True if scores change which rows come next."""
        return self._update is not None

    def update(self, row_N: Tensor, scores_N: Tensor) -> None:
        """Let the sampler take in what rows earned, after it has drawn what it may draw ahead."""
        assert self._update is not None, "the sampler does not react"
        self._batches.wait()
        self._update(row_N, scores_N)

    def state_dict(self) -> dict[str, Any]:
        """The position: what the next batch begins with."""
        return self._state

    def with_ahead(self, position: Mapping[str, Any]) -> dict[str, Any]:
        """Return the position after the last batch taken, as plain data.

        The batches that a sampler that reacts drew ahead are in it.
        """
        reading = position.get(READING)
        if isinstance(reading, Place):
            position = {**position, READING: reading.plain()}
        if not self.reacts or not self._batches.is_started:
            return dict(position)
        self._batches.wait()
        fields = {name for name, value in position.items() if isinstance(value, int)}
        ahead = [
            {
                "places": np.stack([each.drawn.number_B, each.drawn.uid_B], axis=1).tolist(),
                "position": {name: each.position[name] for name in fields},
            }
            for each in self._batches.waiting()
        ]
        return {**position, AHEAD: ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, before the first batch."""
        assert not self._batches.is_started, "batches are made ahead already"
        self._again = list(state.get(AHEAD, ()))
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def metrics(self, position: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Return counts since the run began, up to `position`, or to the last batch taken where it is absent."""
        position = position or self._state
        counts = {f"data/{name}": float(position[name]) for name in ("dropped", "truncated")}
        if is_indexed(self._stream.examples):
            counts["data/epoch"] = position["epoch"] + position["row"] / max(1, len(self._stream.examples))
        return counts | {"data/duplicates": float(count_duplicates(self._stream.examples))}

    def close(self) -> None:
        """End the thread."""
        self._batches.close()
        if self._chunks is not None:
            self._chunks.close()
        if self._close is not None:
            self._close()

    def _draw_apart(self) -> _Batch:
        """The next batch, for code that draws from the global random generators."""
        with drawn_apart():
            return self._draw()

    def _draw(self) -> _Batch:
        """The next batch: one that a checkpoint had drawn ahead, else a new one."""
        if self._again:
            again = self._again.pop(0)
            drawn = self._stream.reread(again["places"])
            self._stream.load_state_dict(again["position"])
        else:
            drawn = self._stream.draw()
        return _Batch(drawn, self._stream.state_dict())

    def _say(self) -> None:
        """Tell once that rows were left out, dropped or cut."""
        counts = self.metrics()
        limits = run_option("max_prompt_tokens") + advice(f" or {run_option('data.encoding.max_tokens')}")
        drawn = f"of the first {self._state['first_uid'] + self._state['row']} drawn"
        for name, what in (
            ("data/duplicates", f"rows were duplicates and were skipped ({run_option('data.unique')})"),
            ("data/dropped", f"rows {drawn} were dropped, since they are longer than {limits}"),
            ("data/truncated", f"rows {drawn} were truncated, since they are longer than {limits}"),
        ):
            if counts[name] and name not in self._reported and self._stream.rank == 0:
                self._reported.add(name)
                log.info(self._names.render(f"{counts[name]:.0f} {what}; {name} counts them"))


def _add_up(world: World, values: np.ndarray) -> np.ndarray:
    """The sum of an array over ranks."""
    total: np.ndarray = world.sum(torch.from_numpy(values)).numpy()
    return total
