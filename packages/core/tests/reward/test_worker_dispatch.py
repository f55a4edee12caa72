"""Rows are dealt to workers so that slow ones spread, and calls go to whichever process is free."""

from __future__ import annotations

import time
from math import isqrt

from hypothesis import given
from hypothesis import strategies as st

from rlhf_core.reward.func import _parts
from rlhf_core.util.worker_processes import Failure, Workers


@given(st.integers(0, 3000), st.integers(0, 9), st.integers(0, 9))
def test_every_row_is_in_one_call(rows: int, batch: int, workers: int) -> None:
    parts = _parts(rows, batch, workers)
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert all(len(part) for part in parts)
    assert not batch or all(len(part) <= batch and part.step == 1 for part in parts)


@given(st.integers(1, 3000), st.integers(2, 9))
def test_slow_rows_spread_over_all_calls(rows: int, workers: int) -> None:
    """Adjacent rows are in different calls; a cost with a period hits all calls alike, since their number is prime."""
    parts = _parts(rows, 0, workers)
    assert len(parts) >= min(rows, 16 * workers)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    calls = {row: number for number, part in enumerate(parts) for row in part}
    assert all(len({calls[row] for row in range(at, at + 8)}) == 8 for at in range(0, max(0, rows - 8), 8))
    if len(parts) < rows:
        assert all(len(parts) % divisor for divisor in range(2, isqrt(len(parts)) + 1))


def test_a_slow_call_delays_no_other() -> None:
    """The quick calls are answered by the other process while one sleeps, and none is sent ahead behind it."""
    workers = Workers(2, "builtins:eval")
    stamp = "__import__('time').monotonic()"
    try:
        workers.map([("1",)] * 4, timeout=120)
        began = time.monotonic()
        calls = [(f"(__import__('time').sleep(1.5), {stamp})[1]",), *[(stamp,)] * 40]
        slow, *quick = workers.map(calls, timeout=120)
    finally:
        workers.close()
    assert slow - began >= 1.5
    assert max(quick) < slow, "one waited behind the slow call"


def test_calls_behind_one_that_dies_go_to_another_process() -> None:
    """Some are sent ahead to the process that dies; only the call that it was at fails."""
    workers = Workers(2, "builtins:eval")
    calls = [(str(i),) for i in range(200)]
    calls[100] = ("__import__('os')._exit(7)",)
    calls[150] = ("'x' * 3_000_000",)  # more than a pipe holds, while requests are on their way
    calls[151] = (f"len({'y' * 2_000_000!r})",)
    try:
        found = workers.map(calls, timeout=120)
    finally:
        workers.close()
    assert isinstance(found[100], Failure) and "exit code 7" in found[100].reason
    assert (len(found[150]), found[151]) == (3_000_000, 2_000_000)
    assert [each for i, each in enumerate(found) if i not in (100, 150, 151)] == [
        i for i in range(200) if i not in (100, 150, 151)
    ]


def test_a_process_that_died_between_two_maps_is_replaced() -> None:
    workers = Workers(1, "builtins:eval")
    late = "__import__('threading').Timer(0.2, __import__('os')._exit, [3]).start()"
    try:
        workers.map([(late,)], timeout=120)
        time.sleep(1.0)
        assert workers.map([("1 + 1",)], timeout=120) == [2]
    finally:
        workers.close()
