"""Waits for coroutines from code that is not asynchronous: one event loop in a separate thread, made on demand.

A separate thread, since the caller may run inside an event loop already, as in a notebook.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from inspect import isawaitable
from typing import Any, Self

__all__ = ["LATE", "EventLoop"]

LATE = object()
"""The result of an awaitable that took too long."""


class EventLoop:
    """A context manager; awaitables of one `with` block share the loop, and so may what they hold (connections)."""

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._thread: ThreadPoolExecutor | None = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._thread.submit(self._runner.close).result()
        self._stack.close()

    def results(self, answers: Sequence[Any], seconds: float | None = None) -> list[Any]:
        """Return `answers` with each awaitable replaced by its result; all are awaited together.

        An awaitable that takes longer than `seconds` is cancelled, and its result is `LATE`. The first exception is raised
        when all are done.
        """
        waiting = {i: answer for i, answer in enumerate(answers) if isawaitable(answer)}
        if not waiting:
            return list(answers)
        if self._thread is None:
            self._thread = self._stack.enter_context(ThreadPoolExecutor(1, "rlhf-event-loop"))
            self._runner = self._thread.submit(asyncio.Runner).result()
        found = self._thread.submit(self._run, list(waiting.values()), seconds).result()
        done = dict(zip(waiting, found, strict=True))
        return [done.get(i, answer) for i, answer in enumerate(answers)]

    def _run(self, awaitables: list[Awaitable[Any]], seconds: float | None) -> list[Any]:
        return self._runner.run(_together(awaitables, seconds))


async def _together(awaitables: list[Awaitable[Any]], seconds: float | None) -> list[Any]:
    """Return the results in order, `LATE` where there is none in time."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    return [LATE if task in late else task.result() for task in tasks]
