"""Calls in several threads, for requests to servers: an interrupted caller does not wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["map_in_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> list[Result]:
    """Return the result of each call, in order, made in up to `count` threads.

    The first call that fails ends the wait, and so does an exception that a signal raises here: calls that have not begun are
    dropped, and those under way end on their own. (An executor's own context would wait for them, past a stop's deadline.)
    """
    threads = ThreadPoolExecutor(count)
    try:
        return list(threads.map(function, items))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
