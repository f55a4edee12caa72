"""`rlhf-run simulate`: what sampling ahead would bring for stated times, before a device is rented."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from rlhf_core.asynchronous.simulation import Workload, simulate
from rlhf_core.contract.commands import Command
from rlhf_core.contract.ranges import at_least, finite
from rlhf_core.errors import OptionError

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext

__all__ = ["Simulate"]

HEAD = "ahead  s/step  speedup  overlap  staleness  oldest  sampler idle  trainer idle"


@dataclass(frozen=True)
class Simulate(Command):
    """Show step time, overlap, staleness and idle shares of asynchronous sampling for given times, in simulated time."""

    _: KW_ONLY
    generation: float = 10.0
    """seconds to sample one step's completions"""
    training: float = 10.0
    """seconds to train on them, scoring and credit included"""
    sync: float = 0.0
    """seconds to hand the new weights to the engines"""
    spread: float = 0.0
    """spread of generation times: standard deviation of their logarithm, for example 0.3"""
    ahead: int = 4
    """largest number of steps to sample ahead; every number from 0 to this one is simulated"""
    updates: int = 1
    """optimizer updates per step, --update-epochs times --minibatches; staleness is counted in them"""
    steps: int = 200
    """steps of the simulated run"""
    seed: int = 0
    """seed of the generation times"""

    def __post_init__(self) -> None:
        at_least(0, self, "generation", "training", "sync", "spread", "ahead", "seed")
        finite(self, "generation", "training", "sync", "spread")
        at_least(1, self, "updates")
        at_least(3, self, "steps")
        for name in ("generation", "training"):
            if not getattr(self, name):
                raise OptionError(name, "must be above 0 seconds, since otherwise nothing overlaps")

    def __call__(self, context: CommandContext) -> int:
        """Print a line per number of steps ahead."""
        workload = Workload(self.generation, self.training, self.sync, self.steps, self.updates, self.spread, self.seed)
        serial = simulate(workload, 0).step
        print(HEAD)
        for ahead in range(self.ahead + 1):
            found = simulate(workload, ahead)
            print(
                f"{ahead:5}  {found.step:6.2f}  {serial / found.step:6.2f}x  {found.overlap(workload):7.2f}  "
                f"{found.staleness:9.2f}  {max(found.ages):6}  {found.idle_sampler:11.0%}   {found.idle_trainer:11.0%}"
            )
        return 0
