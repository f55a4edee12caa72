"""An event loop that runs in a separate thread for as long as an engine lives, for callers in any other thread."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["LoopThread"]

Result = TypeVar("Result")

CLOSE_SECONDS = 10.0
"""Deadline for the end of the loop."""


class LoopThread:
    """Runs coroutines. Processes that it starts inherit that SIGINT is blocked: Ctrl-C is for the trainer alone."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rlhf-vllm-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def call(self, work: Coroutine[Any, Any, Result], seconds: float | None = None) -> Result:
        """Return what `work` returns.

        Args:
            work: runs in the loop; it is cancelled if the caller stops waiting.
            seconds: deadline; None for work that has its own deadlines.

        Raises:
            TimeoutError: the deadline is over.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop and its thread; a second call does nothing."""
        if self._loop.is_closed():
            return
        self.call(_cancel_others(), CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_others() -> None:
    """Cancel all tasks of the loop but this one."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
