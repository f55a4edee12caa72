"""Observers that write down in which ranks they are called; `-p watching_ranks` makes this module a plugin of all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rlhf_core import Evaluator, Observer, RunView, hookimpl

all_ranks = True


@dataclass(frozen=True)
class Everywhere(Observer):
    """Watches in every rank, and ends the run after step 2 if the last rank wishes so."""

    all_ranks: ClassVar[bool] = True

    def __call__(self, run: RunView) -> Watch:
        return Watch("everywhere", run)


@dataclass(frozen=True)
class First(Observer):
    """Watches in the first rank, as observers do that declare nothing."""

    def __call__(self, run: RunView) -> Watch:
        return Watch("first", run)


class Watch:
    """Adds a line per call to OUTPUT/<name>-<rank>.txt."""

    def __init__(self, name: str, run: RunView) -> None:
        self.path, self.run = Path(run.output) / f"{name}-{run.world.rank}.txt", run

    def line(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{text}\n")

    @hookimpl
    def rlhf_run_start(self) -> None:
        self.line("start")

    @hookimpl
    def rlhf_rollouts_ready(self, source: str, rollouts: Any) -> None:
        self.line(f"{source} sampled {len(rollouts)}")

    @hookimpl
    def rlhf_before_update(self, role: str) -> None:
        self.line(f"{role} before {self.run.step + 1}")

    @hookimpl
    def rlhf_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.line(f"evaluated {step}: {sorted(metrics)}")

    @hookimpl
    def rlhf_step_end(self, step: int) -> bool:
        self.line(f"step {step}")
        return step == 2 and self.path.name == "everywhere-1.txt"

    @hookimpl
    def rlhf_run_end(self, error: BaseException | None) -> None:
        self.line(f"end {error}")


@dataclass(frozen=True)
class Ranks(Evaluator):
    """An evaluator that counts ranks."""

    def __call__(self, run: RunView) -> Mapping[str, float]:
        return {"ranks": run.world.total(1.0)}


@hookimpl
def rlhf_evaluated(run: RunView, step: int) -> None:
    ranks = run.world.total(1.0)  # collective: it would hang if a rank were missing
    with (run.output / f"plugin-{run.world.rank}.txt").open("a") as file:
        file.write(f"{step} of {ranks:.0f} ranks\n")
