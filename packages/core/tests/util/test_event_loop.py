"""One event loop for a process: what a coroutine opened serves the next one, whoever waits for it."""

from __future__ import annotations

import asyncio
import os
import threading
from contextvars import ContextVar

import pytest

from rlhf_core.util.event_loop import LATE, results, run


async def loop_of() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_a_connection_of_one_call_serves_the_next_from_any_thread() -> None:
    """As clients do that a library shares, or that a module makes when it is imported."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    async def connect() -> tuple[asyncio.Server, asyncio.StreamReader, asyncio.StreamWriter]:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        return server, *await asyncio.open_connection(*server.sockets[0].getsockname()[:2])

    async def ask(line: bytes) -> bytes:
        writer.write(line)
        async with asyncio.timeout(60):
            return await reader.readline()

    async def end() -> None:
        writer.close()
        server.close()

    server, reader, writer = run(connect())
    answers = [run(ask(b"a\n"))]
    thread = threading.Thread(target=lambda: answers.append(run(ask(b"b\n"))), daemon=True)
    thread.start()
    thread.join(60)
    assert answers == [b"a\n", b"b\n"]
    run(end())


def test_all_results_come_in_order_and_late_ones_are_cancelled() -> None:
    cancelled = []

    async def slow() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.append(1)

    async def quick() -> int:
        return 3

    assert results([1, quick(), slow(), 2], seconds=0.2) == [1, 3, LATE, 2]
    assert cancelled == [1]


def test_who_runs_in_the_loop_may_not_wait_for_it() -> None:
    async def waiting() -> None:
        run(loop_of())

    with pytest.raises(RuntimeError, match="await the coroutine instead"):
        run(waiting())


def test_an_exit_reaches_who_waits_and_the_loop_goes_on() -> None:
    before = run(loop_of())

    async def leave() -> None:
        raise SystemExit(7)

    with pytest.raises(SystemExit) as caught:
        run(leave())
    assert caught.value.code == 7
    assert run(loop_of()) is before


def test_a_coroutine_sees_the_context_of_its_caller() -> None:
    """Messages spell options as the caller does."""
    spelling: ContextVar[str] = ContextVar("spelling", default="")

    async def read() -> str:
        return spelling.get()

    spelling.set("flags")
    assert run(read()) == "flags"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_a_loop_of_its_own() -> None:
    run(loop_of())
    child = os.fork()
    if not child:
        try:
            os._exit(0 if results([asyncio.sleep(0, "there")]) == ["there"] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
