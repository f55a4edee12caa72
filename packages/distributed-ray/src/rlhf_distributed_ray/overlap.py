"""Calls to several roles at once: in threads of the controller, since the work is done by processes elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["call_chains"]

T = TypeVar("T")


def call_chains(calls: Mapping[str, Callable[[], T]], chains: Sequence[Sequence[str]]) -> dict[str, T]:
    """Make the calls of each chain in turn, and chains at once; return the results by name, in the order of `calls`.

    All chains come to their end before an error is raised, the first by the order of chains, so that nothing is still at work
    when a run continues after it. An exception that a signal raises here does not wait for them.
    """
    if len(chains) <= 1:
        return {name: calls[name]() for name in calls}
    threads = ThreadPoolExecutor(len(chains), thread_name_prefix="roles")
    try:
        begun = [threads.submit(_call_in_turn, calls, chain) for chain in chains]
        wait(begun)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    found = {name: result for each in begun for name, result in each.result().items()}
    return {name: found[name] for name in calls}


def _call_in_turn(calls: Mapping[str, Callable[[], T]], chain: Sequence[str]) -> dict[str, T]:
    return {name: calls[name]() for name in chain}
