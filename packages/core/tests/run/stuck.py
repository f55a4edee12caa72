"""Runs that are told to stop while something in them never returns; `test_polite_stop` has them as processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from rlhf_core.cli import main
from rlhf_core.contract.batch import Batch, Rollouts
from rlhf_core.contract.providers import Loss, Reward
from rlhf_core.contract.results import LossTerms, Reduction
from rlhf_core.testing.tiny_algorithm import TinyLoss

CALLS = itertools.count(1)


def _spin() -> None:
    while True:
        pass


def _swallow() -> None:
    while True:
        with contextlib.suppress(BaseException):  # what a stop has to get through
            time.sleep(60)


def _wait_for_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def _search() -> None:
    re.search("(a+)+b", "a" * 64)  # the engine of `re` keeps the interpreter, and looks at signals


def _sum() -> None:
    sum(itertools.repeat(1))  # keeps the interpreter and never looks


def _leave_thread() -> None:
    threading.Thread(target=time.sleep, args=(600,)).start()
    time.sleep(600)


WAYS: Mapping[str, Callable[[], None]] = {
    "sleep": lambda: time.sleep(600),
    "spin": _spin,
    "swallow": _swallow,
    "lock": _wait_for_lock,
    "search": _search,
    "sum": _sum,
    "thread": _leave_thread,
    "hangup": lambda: None,
}
"""How to never return; a hangup that is ignored does."""


def get_stuck(way: str, signals: str) -> None:
    """Send signals to this process, by their names, and never return."""
    for name in signals.split("+"):
        os.kill(os.getpid(), signal.Signals[name])
    WAYS[way]()


@dataclass(frozen=True)
class Stuck(Reward):
    """Random rewards; the second call never returns."""

    way: str = ""
    """how; empty returns"""
    signals: str = "SIGTERM"
    """what the process gets then"""
    rank: int = 0
    """the rank that is stuck; the others get the signals and wait for it"""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        rewards = [random.random() for _ in rollouts.texts]
        if self.way and next(CALLS) == 2:
            if int(os.environ.get("RANK", "0")) == self.rank:
                get_stuck(self.way, self.signals)
            signals, process = self.signals.split("+"), os.getpid()
            for name in signals:  # once this rank waits for the other
                threading.Timer(1.0, os.kill, (process, signal.Signals[name])).start()
        return rewards


@dataclass(frozen=True)
class StuckLoss(Loss):
    """A policy gradient that never returns at the second step."""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"advantages_NT"})

    def __call__(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> LossTerms:
        if batch.step.progress > 0:
            get_stuck("sleep", "SIGTERM")
        return LossTerms(TinyLoss()(outputs, batch).values, Reduction("token"))


def run(*words: str) -> int:
    """Be the command `rlhf-run`, at the end of which Python waits for threads."""
    sys.argv = ["rlhf-run", *words]
    return main()


def run_with_pid(file: str, *words: str) -> int:
    """Leave the number of this process in the file, for a worker that signals it."""
    Path(file).write_text(str(os.getpid()))
    return run(*words)


def run_under_nohup(*words: str) -> int:
    """Start as `nohup` does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return run(*words)
