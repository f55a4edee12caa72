"""A run without models: the scheduler of `--ahead` with stated times for sampling, training and syncing, in simulated time.

Queue, gate and supply are those of a real run; sleeping takes the place of work. Simulated time costs next to nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from rlhf_core.asynchronous.gate import EngineGate
from rlhf_core.asynchronous.queue import IterationQueue
from rlhf_core.asynchronous.supply import AheadSupply, InTurn
from rlhf_core.util.clock import current_time, simulated_time, sleep

__all__ = ["Outcome", "Workload", "simulate"]


@dataclass(frozen=True)
class Workload:
    """Times of a run, in seconds."""

    generation: float
    """sampling of one step's completions"""
    training: float
    """training on them, scoring and credit included"""
    sync: float = 0.0
    """handing the new weights to the engines"""
    steps: int = 200
    """number of steps, at least 3"""
    updates: int = 1
    """optimizer updates per step"""
    spread: float = 0.0
    """standard deviation of the logarithm of a generation's time"""
    seed: int = 0

    def generation_times(self) -> list[float]:
        """Return the time of each step's generation; their expected mean is `generation`."""
        draw = random.Random(self.seed)  # noqa: S311  nothing is secret here
        shift = self.spread * self.spread / 2  # the mean of a log-normal variable is exp(mu + sigma^2 / 2)
        return [self.generation * draw.lognormvariate(-shift, self.spread) for _ in range(self.steps)]


@dataclass
class Outcome:
    """Measurements of a simulated run."""

    ahead: int
    step_ends: list[float] = field(default_factory=list)
    """time at which each step was over"""
    ages: list[int] = field(default_factory=list)
    """age of each step's completions when they were trained on, in optimizer updates"""
    sampling: float = 0.0
    """seconds that the engines sampled"""
    training: float = 0.0
    """seconds that the roles trained"""

    @property
    def step(self) -> float:
        """Mean seconds per step, without the first and the last one, which have nothing to overlap with."""
        return (self.step_ends[-2] - self.step_ends[0]) / (len(self.step_ends) - 2)

    @property
    def staleness(self) -> float:
        """Mean age of completions, in optimizer updates."""
        return sum(self.ages) / len(self.ages)

    @property
    def idle_sampler(self) -> float:
        """Share of the time in which the engines do not sample."""
        return 1 - self.sampling / self.step_ends[-1]

    @property
    def idle_trainer(self) -> float:
        """Share of the time in which the roles do not train."""
        return 1 - self.training / self.step_ends[-1]

    def overlap(self, workload: Workload) -> float:
        """Return the time saved per step over the most that could be: at 1 the longer phase hides all of the shorter one."""
        generation = self.sampling / len(self.step_ends)
        longer = max(generation, workload.training) + workload.sync
        serial = generation + workload.training + workload.sync
        return (serial - self.step) / (serial - longer)


def simulate(workload: Workload, ahead: int) -> Outcome:
    """Return what a run with these times measures when `ahead` steps may be sampled ahead."""
    outcome, times = Outcome(ahead), workload.generation_times()
    with simulated_time():
        gate = EngineGate()

        def collect(step: int) -> int:
            with gate.sampling() as after:
                sleep(times[step - 1])
            outcome.sampling += times[step - 1]
            return after

        queue = IterationQueue(ahead, workload.steps)
        supply = AheadSupply(collect, queue, gate.changed) if ahead else InTurn(collect)
        for step in range(1, workload.steps + 1):
            after = supply.take()
            outcome.ages.append((step - 1 - after) * workload.updates)
            sleep(workload.training)
            outcome.training += workload.training
            with gate.weights(step):
                sleep(workload.sync)
            outcome.step_ends.append(current_time())
        supply.close()
    return outcome
