"""Queue of agents' requests to the engine: coroutines wait, and one thread samples what they gathered."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_core.contract.batch import Rollouts

__all__ = ["Ask", "AskQueue", "SampledRow"]


@dataclass(frozen=True)
class Ask:
    """One turn that is asked for."""

    episode: int
    """number of the episode in its batch"""
    token_ids: tuple[int, ...]
    uid: int
    """the number that seeds the turn"""
    limit: int
    """tokens of the turn at most"""
    stop: tuple[str, ...]
    """strings that end it, in addition to the run's"""


@dataclass(frozen=True)
class SampledRow:
    """Row `row` of what the engine sampled."""

    rollouts: Rollouts
    row: int


@dataclass
class _Waiting:
    """An ask, and the future that gets its answer."""

    ask: Ask
    answer: asyncio.Future[SampledRow]
    since: float = field(default_factory=time.monotonic)


class AskQueue:
    """Gathers asks until every episode that runs has one, or the first of them has waited for `gather` seconds.

    Args:
        gather: seconds.
    """

    def __init__(self, gather: float) -> None:
        self.gather = gather
        self._changed = threading.Condition()
        self._waiting: list[_Waiting] = []
        self._running = 0
        self._closed = False

    # in the event loop ------------------------------------------------------------------------------------------------

    def add_episode(self) -> None:
        """Count an episode that begins."""
        with self._changed:
            self._running += 1

    def remove_episode(self) -> None:
        """Count an episode that has ended."""
        with self._changed:
            self._running -= 1
            self._changed.notify()

    async def wait_for(self, ask: Ask) -> SampledRow:
        """Wait for the engine's answer. An ask that is cancelled while it waits is forgotten."""
        waiting = _Waiting(ask, asyncio.get_running_loop().create_future())
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify()
        return await waiting.answer

    def close(self) -> None:
        """Let `take` return None: no episode runs any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # in the thread that samples ---------------------------------------------------------------------------------------

    def take(self) -> list[_Waiting] | None:
        """Return asks that one call of the engine answers, all with the same `stop`, by episode; None when all are over."""
        with self._changed:
            while not self._closed:
                self._waiting = [each for each in self._waiting if not each.answer.done()]
                if not self._waiting:
                    self._changed.wait()
                    continue
                left = self._waiting[0].since + self.gather - time.monotonic()
                if left > 0 and len(self._waiting) < self._running:
                    self._changed.wait(left)
                    continue
                stop = self._waiting[0].ask.stop
                taken = [each for each in self._waiting if each.ask.stop == stop]
                self._waiting = [each for each in self._waiting if each.ask.stop != stop]
                return sorted(taken, key=lambda each: each.ask.episode)
            return None

    @staticmethod
    def give(taken: Sequence[_Waiting], rollouts: Rollouts) -> None:
        """Answer the asks that `take` returned with the rows of `rollouts`."""
        for row, each in enumerate(taken):
            each.answer.get_loop().call_soon_threadsafe(_answer, each.answer, SampledRow(rollouts, row))


def _answer(future: asyncio.Future[SampledRow], sampled: SampledRow) -> None:
    if not future.done():
        future.set_result(sampled)
