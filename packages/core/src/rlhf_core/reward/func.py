"""`--reward func`: a function of the user's.

    def reward_func(queries, prompts, labels):
        return torch.tensor([...])          # or a list; or {"rewards": …, "scores": …, "extra_logs": {name: …}}

is OpenRLHF's signature: `queries` are prompt and completion as one text, and each argument is a list. A function that
names other arguments gets those, of `queries`, `prompts`, `completions`, `labels`, `meta`, `raw_completions`
(with special tokens), `finish` ("stop" or "length", for example) and `token_ids`, and of the columns that rows
carry in `meta` (`--data.meta-keys`; all columns of rows given from Python); `**kwargs` gets the rest. That is TRL's signature,
`f(completions, solution, **kwargs)`; here prompts and completions are always texts. It may be `async`. A reward that is None
abstains: the sample leaves its group.

A sample that the function fails on (it raises, hangs in a worker, answers for the wrong number of samples) stops the run
and is named, unless a fallback was chosen; then it gets that reward and is counted in the metric `failed`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from rlhf_core.config.python_values import function_name
from rlhf_core.contract.providers import Reward
from rlhf_core.contract.results import RewardOutput
from rlhf_core.errors import OptionError, UsageError, advice, option, run_option
from rlhf_core.lazy import torch
from rlhf_core.reward.calls import Answer, Columns, absent_column, call, load_function, read_columns
from rlhf_core.reward.output import excerpt
from rlhf_core.util.worker_processes import Failure, Workers, reason

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext

__all__ = ["Func"]

TARGET = "rlhf_core.reward.calls:call"
"""Function that workers run."""

CALLS_PER_WORKER = 16
"""Calls that a worker gets on average: a last one that is slow costs a sixteenth; more would cost cheap functions more."""


@dataclass(frozen=True)
class Func(Reward):
    """Calls your Python function, from a .py file or module:name."""

    path: str | Callable[..., Any]
    """the function: a .py file, or module:name; from Python the function itself"""
    name: str = "reward_func"
    """name of the function in the file"""
    batch: int = 0
    """number of adjacent samples per call; 0 passes all in one call, or with several workers many small calls of
    samples that are not adjacent"""
    workers: int = 0
    """number of worker processes, for slow or CPU-bound code; 0 runs the function in this process"""
    timeout: float = 0.0
    """time limit of a call, in seconds, before its worker is killed; needs workers. 0 means no limit"""
    fallback: float | None = None
    """reward of samples on which the function fails, counted in reward/failed; by default they stop the run"""

    def check(self) -> None:
        """A wrong path is the user's mistake before it is a worker's failure."""
        if self.timeout and not self.workers:
            raise OptionError("timeout", f"needs a separate process: pass {option('workers', 1)} too")
        if self.workers and not isinstance(self.path, str):
            raise OptionError(
                "workers", f": other processes cannot import {self.label}; move it to a module or a file, and name that"
            )
        load_function(self.path, self.name)

    @property
    def label(self) -> str:
        """The function's name, for messages and metrics."""
        return self.path if isinstance(self.path, str) else function_name(self.path)

    def open(self, context: OpenContext) -> FuncEngine:
        """Make the processes, if there are some; they start at the first call."""
        return FuncEngine(self)


class FuncEngine:
    """The function, in this process or in others.

    Args:
        reward: its options.
    """

    def __init__(self, reward: Func) -> None:
        self.reward = reward
        self.workers = Workers(reward.workers, TARGET, (reward.path, reward.name)) if reward.workers else None

    def close(self) -> None:
        """End the processes, with all they started."""
        if self.workers is not None:
            self.workers.close()

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        self.reward.check()
        function = load_function(self.reward.path, self.reward.name)
        columns = _columns(rollouts, function)
        if absent := absent_column(function, columns):
            meta = advice(f"; {run_option('data.meta_keys')} adds columns of the data")
            raise UsageError(
                f"{self.reward.label}: the function asks for {absent!r}, but the columns are {', '.join(columns)}{meta}"
            )
        N = len(rollouts)
        parts = _parts(N, self.reward.batch, self.reward.workers)
        answers = list(zip(parts, self._calls(columns, parts)))
        known = [(rows, answer) for rows, answer in answers if isinstance(answer, Answer)]
        for rows, failure in answers:
            if isinstance(failure, Failure):
                known += self._one_by_one(rollouts, columns, rows, failure)
        return self._join(known, N)

    def _calls(self, columns: Columns, parts: Sequence[range]) -> list[Any]:
        """An `Answer` or a `Failure` for each part of the rows."""
        calls = _Calls(self.reward, columns, parts)
        if self.workers is not None:
            return self.workers.map(calls, self.reward.timeout, seed=random.getrandbits(63))
        return [_call_guarded(arguments) for arguments in calls]

    def _one_by_one(
        self, rollouts: Rollouts, columns: Columns, rows: range, failure: Failure
    ) -> list[tuple[range, Answer]]:
        """The answers for the rows of a failed call, each asked alone; raises without a fallback."""
        parts = [range(row, row + 1) for row in rows]
        answers = self._calls(columns, parts) if len(rows) > 1 else [failure]
        failed = {part[0]: answer for part, answer in zip(parts, answers) if isinstance(answer, Failure)}
        if self.reward.fallback is None:
            row = min(failed, default=None)
            if row is None:
                some = f"{rows[0]} to {rows[-1]}" if rows.step == 1 else f"{rows[0]}, {rows[1]} …"
                raise UsageError(
                    f"{self.reward.label}: {failure.reason}, when called with samples {some} together, "
                    "but not when called with one of them at a time"
                )
            raise UsageError(f"{self.reward.label}: {failed[row].reason}, on {excerpt(rollouts, row)}")
        return [(part, answer) for part, answer in zip(parts, answers) if part[0] not in failed]

    def _join(self, known: Sequence[tuple[range, Answer]], N: int) -> RewardOutput:
        """One output; rows without an answer, or with one that is not finite, get the fallback and are counted."""
        nothing = math.nan if self.reward.fallback is None else self.reward.fallback
        rewards, scores, abstained = [nothing] * N, [0.0] * N, [False] * N
        answered = [False] * N
        logs: dict[str, list[float]] = {name: [0.0] * N for _, answer in known for name in answer.logs}
        for rows, answer in known:
            at = slice(rows.start, rows.stop, rows.step)
            strict = self.reward.fallback is None
            fine = [reward is None or strict or math.isfinite(reward) for reward in answer.rewards]
            abstained[at], answered[at] = [reward is None for reward in answer.rewards], fine
            rewards[at] = [
                nothing if reward is None or not good else reward
                for reward, good in zip(answer.rewards, fine, strict=True)
            ]
            if answer.scores is not None:
                scores[at] = [
                    0.0 if score is None or not good else score for score, good in zip(answer.scores, fine, strict=True)
                ]
            for name, values in answer.logs.items():
                logs[name][at] = values
        if self.reward.fallback is not None:
            logs["failed"] = [float(not fine) for fine in answered]
        scored = any(answer.scores is not None for _, answer in known)
        return RewardOutput(
            rewards_N=torch.tensor(rewards),
            scores_N=torch.tensor(scores) if scored else None,
            metrics={name: torch.tensor(values) for name, values in logs.items()},
            abstained_N=torch.tensor(abstained) if any(abstained) else None,
        )


def _parts(N: int, batch: int, workers: int) -> list[range]:
    """Return the rows of each call, from `N` rows.

    Without a `batch`, several workers get `CALLS_PER_WORKER` calls each, so that one that is done early takes over from others.
    The completions of a hard prompt are adjacent, so a call takes rows that are as far apart as there are calls. The number of
    calls is prime: a cost that repeats with any period in the rows hits all calls alike. Nothing here depends on time, so that
    a reward that draws random numbers repeats.
    """
    if batch or workers < 2:
        size = batch or max(N, 1)
        return [range(start, min(start + size, N)) for start in range(0, N, size)]
    calls = _next_prime(workers * CALLS_PER_WORKER)
    return [range(start, N, calls) for start in range(min(calls, N))]


def _next_prime(number: int) -> int:
    """Return the smallest prime that is not below `number`."""
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


class _Calls(Sequence[tuple[Any, ...]]):
    """Arguments of each call, which are made when the call is sent: the first process need not wait for the last call.

    Args:
        reward: whose function is called.
        columns: of all rows.
        parts: rows of each call.
    """

    def __init__(self, reward: Func, columns: Columns, parts: Sequence[range]) -> None:
        self._reward, self._columns, self._parts = reward, columns, parts

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Any, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Any, ...] | Sequence[tuple[Any, ...]]:
        if isinstance(index, slice):
            return _Calls(self._reward, self._columns, self._parts[index])
        rows = self._parts[index]
        of_rows = {name: column[rows.start : rows.stop : rows.step] for name, column in self._columns.items()}
        return self._reward.path, self._reward.name, of_rows


def _columns(rollouts: Rollouts, function: Callable[..., Any]) -> Columns:
    """Return the columns that `function` reads."""
    columns: dict[str, Callable[[], list[Any]]] = {
        "queries": lambda: [prompt + text for prompt, text in zip(rollouts.prompts, rollouts.texts)],
        "prompts": lambda: rollouts.prompts,
        "completions": lambda: rollouts.texts,
        "labels": lambda: rollouts.labels,
        "meta": lambda: list(rollouts.meta),
        "raw_completions": lambda: rollouts.raw_texts or rollouts.texts,
        "finish": lambda: list(rollouts.finish) or [""] * len(rollouts),
        "token_ids": lambda: [
            ids[:length] for ids, length in zip(rollouts.tokens_NT.tolist(), rollouts.lengths_N.tolist())
        ],
    }
    of_data = _meta_columns(rollouts.meta)
    names = read_columns(function, {**of_data, **columns})
    return {name: columns[name]() if name in columns else of_data[name] for name in names}


def _meta_columns(meta: Sequence[Mapping[str, Any]]) -> Columns:
    """The columns that all rows carry."""
    names = set(meta[0]).intersection(*meta) - {"prompt", "transcript"} if meta else ()
    return {name: [each[name] for each in meta] for name in sorted(names)}


def _call_guarded(arguments: tuple[Any, ...]) -> Answer | Failure:
    """A call in this process."""
    try:
        return call(*arguments)
    except (Exception, SystemExit) as error:
        return Failure(reason(error))
