"""A taskset of verifiers: sums of two equal numbers. An answer with an even number of letters is rewarded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumTask(vf.Task[vf.TaskData]):  # type: ignore[misc]  # verifiers may be absent where types are checked
    @vf.reward(weight=2.0)  # type: ignore[untyped-decorator]
    async def even(self, trace: Any) -> float:
        return float(len(trace.last_reply) % 2 == 0)

    @vf.metric  # type: ignore[untyped-decorator]
    async def letters(self, trace: Any) -> float:
        return float(len(trace.last_reply))


class SumsConfig(vf.TasksetConfig):  # type: ignore[misc]
    first: int = 2


class Sums(vf.Taskset[SumTask, SumsConfig]):  # type: ignore[misc]
    def load(self) -> Iterator[SumTask]:
        for number in range(self.config.first, self.config.first + 2):
            yield SumTask(vf.TaskData(prompt=f"{number}+{number}="), self.config.task)
