"""The event loop of a process, in a separate thread made on demand, for code that is not asynchronous.

A separate thread, since the caller may run inside an event loop already, as in a notebook. One loop for as long as the process
lives, since programs keep what belongs to a loop: a client made when a module is imported, or the connections that a library
shares between its clients, would fail in the second batch if each batch had a loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from inspect import isawaitable
from typing import Any, TypeVar

__all__ = ["LATE", "results", "run", "start"]

LATE = object()
"""The result of an awaitable that took too long."""

Result = TypeVar("Result")


class _Thread:
    """The loop of this process, and the thread that it runs in."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which runs.

        Raises:
            OSError: the machine has no room for another one.
        """
        with self.lock:
            if self.loop is None:
                loop = asyncio.new_event_loop()
                threading.Thread(target=_serve, args=(loop,), name="rlhf-event-loop", daemon=True).start()
                self.loop = loop
            return self.loop

    def forget(self) -> None:
        """In a process that was forked, which has the loop and not its thread."""
        self.__init__()  # type: ignore[misc]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop. `sys.exit` in a coroutine leaves it; who waits for the coroutine gets that, and the loop goes on."""
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue


_thread = _Thread()
if sys.platform != "win32":  # which has no fork
    os.register_at_fork(after_in_child=_thread.forget)


def start(work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Run a coroutine in the loop, in the context of the caller; return what will be its result.

    Raises:
        OSError: the machine has no room for an event loop.
        RuntimeError: the caller runs in the loop, and would wait for itself.
    """
    try:
        loop = _thread.get()
        if loop is _running_loop():
            raise RuntimeError(
                "this code runs in the event loop that it wants to wait for; await the coroutine instead"
            )
    except BaseException:
        work.close()
        raise
    context = copy_context()

    async def within() -> Result:
        return await loop.create_task(work, context=context)

    return asyncio.run_coroutine_threadsafe(within(), loop)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine that runs in the loop; it is cancelled if the caller stops waiting."""
    future = start(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def results(answers: Sequence[Any], seconds: float | None = None) -> list[Any]:
    """Return `answers` with each awaitable replaced by its result; all are awaited together.

    An awaitable that takes longer than `seconds` is cancelled, and its result is `LATE`. The first exception is raised when
    all are done.
    """
    waiting = {i: answer for i, answer in enumerate(answers) if isawaitable(answer)}
    if not waiting:
        return list(answers)
    done = dict(zip(waiting, run(_together(list(waiting.values()), seconds)), strict=True))
    return [done.get(i, answer) for i, answer in enumerate(answers)]


async def _together(awaitables: list[Awaitable[Any]], seconds: float | None) -> list[Any]:
    """Return the results in order, `LATE` where there is none in time."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        _, late = await asyncio.wait(tasks, timeout=seconds)
    except asyncio.CancelledError:  # the caller waits no more
        for task in tasks:
            task.cancel()
        raise
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
    return [LATE if task in late else task.result() for task in tasks]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
