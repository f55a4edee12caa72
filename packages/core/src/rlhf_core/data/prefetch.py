"""Batches made ready while the loop works: a thread draws from the stream a little ahead.

The position is that of the last batch taken, never of those made ahead, so that a resumed run goes on exactly there. What
goes wrong while reading ahead is raised when the loop gets to it. Rows that are left out or cut are counted in
`data/dropped` and `data/truncated` and said once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from queue import Full, Queue
from typing import TYPE_CHECKING, Any

from rlhf_core.data.mixture import count_duplicates
from rlhf_core.data.prepare import Preparer
from rlhf_core.data.stream import DrawnRows, Stream
from rlhf_core.errors import advice, run_option
from rlhf_core.option_text import OptionNames
from rlhf_core.util.messages import log

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Example
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.providers import Data
    from rlhf_core.data.encoder import Encoder

__all__ = ["Prefetcher"]

DEPTH = 2
"""Batches that wait for the loop."""
PAUSE = 0.1
"""Seconds after which a thread that waits looks whether it should end."""


class Prefetcher:
    """A stream, read ahead by a thread of its own from the first batch on.

    Args:
        stream: what to read; from then on only through here.
        close: called at the end.
        names: of the user's options, for messages.
    """

    def __init__(
        self, stream: Stream, close: Callable[[], None] | None = None, names: OptionNames | None = None
    ) -> None:
        self._stream, self._close, self._names = stream, close, names or OptionNames()
        self._state = stream.state_dict()
        self._ready: Queue[tuple[DrawnRows, dict[str, Any]] | BaseException] = Queue(DEPTH)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
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
    ) -> Prefetcher:
        """The rows of the provider `data`, prepared for this rank; `readers` as `Stream` takes it."""
        preparer = Preparer(encoder, online, data)
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
        )
        return cls(stream, preparer.close, config.option_names)

    def __next__(self) -> DrawnRows:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="data", daemon=True)
            self._thread.start()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again
            raise item
        drawn, self._state = item
        self._say()
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The position: what the next batch begins with."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position, before the first batch."""
        assert self._thread is None, "batches are made ahead already"
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def metrics(self, position: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Return counts since the run began, up to `position`, or to the last batch taken where it is absent."""
        counts = {f"data/{name}": float((position or self._state)[name]) for name in ("dropped", "truncated")}
        return counts | {"data/duplicates": float(count_duplicates(self._stream.examples))}

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._close is not None:
            self._close()

    def _read(self) -> None:
        item: tuple[DrawnRows, dict[str, Any]] | BaseException
        while not self._closed.is_set():
            try:
                item = next(self._stream), self._stream.state_dict()
            except BaseException as error:  # the loop's business
                item = error
            while not self._closed.is_set():
                try:
                    self._ready.put(item, timeout=PAUSE)
                    break
                except Full:
                    continue
            if isinstance(item, BaseException):
                return

    def _say(self) -> None:
        """Tell once that rows were left out, dropped or cut."""
        counts = self.metrics()
        limits = run_option("max_prompt_tokens") + advice(f" or {run_option('data.encoding.max_tokens')}")
        drawn = f"of the first {self._state['first_uid'] + self._state['row']} drawn"
        for name, what in (
            ("data/duplicates", f"rows came before and were left out ({run_option('data.unique')})"),
            ("data/dropped", f"rows {drawn} were dropped, being longer than {limits}"),
            ("data/truncated", f"rows {drawn} were truncated, being longer than {limits}"),
        ):
            if counts[name] and name not in self._reported and self._stream.leads:
                self._reported.add(name)
                log.info(self._names.render(f"{counts[name]:.0f} {what}; {name} counts them"))
