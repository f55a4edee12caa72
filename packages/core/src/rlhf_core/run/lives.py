"""The lives of a run: after the death of a process it closes, except its placement, and continues from what is left.

A life begins as a resumed run does: providers are opened anew, logs are cut behind the step that is restored, and data and
random states continue there. So a step counts once, whatever was trained on it before. The state comes from the newest
checkpoint, or from a snapshot that the placement holds in memory (`Placement.keep`) if that is as new. Where there is neither,
the run begins again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_core.checkpoint.manifest import list_checkpoints, step_number
from rlhf_core.errors import WorkerLost
from rlhf_core.util.clock import current_time
from rlhf_core.util.messages import log
from rlhf_core.util.random_states import get_random_states, set_random_states

if TYPE_CHECKING:
    from rlhf_core.run.run import Run

__all__ = ["Lives"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Snapshot:
    """All of a step's state that no role holds."""

    step: int
    state: dict[str, Any]
    engine_states: dict[str, Any]
    random_states: dict[str, Any]


class Lives:
    """Counts the deaths of a run's processes, and restores the run after each.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.revives = False
        """the placement is that of the life before, and its roles are brought back"""
        self._snapshot: Snapshot | None = None
        self._deaths, self._died = 0, 0.0
        self._counts: dict[str, float] = {}
        """recoveries that no line of the metrics has yet"""
        self._told: dict[int, dict[str, float]] = {}
        """recoveries that a line has, by step; lines of steps that come again are cut"""

    def live(self, train: Callable[[], Result]) -> Result:
        """Return what `train` returns, in the first life that does not end by a death.

        Raises:
            WorkerLost: a process died, and the run has no life left.
        """
        while True:
            try:
                return train()
            except WorkerLost as lost:
                if not self.spares(lost):
                    raise
                self._deaths += 1
                self._died = self._died or current_time()
                log.warning(f"{lost.report}; the run continues without it")
                self.revives = True
                self.run.begin_again(replace(self.run.config, resume=True))

    def spares(self, error: BaseException | None) -> bool:
        """Return True if the run continues after `error`, so that its placement must not be freed."""
        placed = self.run.placed
        alive = placed is not None and self._deaths < placed.retries and self.run.signals.received is None
        return alive and isinstance(error, WorkerLost)

    def keep(self) -> None:
        """Let the placement take a snapshot of the step that has just ended, if it is time."""
        run, placed = self.run, self.run.placed
        assert placed is not None
        if not placed.snapshot_every or run.step % placed.snapshot_every:
            return
        with run.phase("checkpoint"):
            state = json.loads(
                json.dumps(run.capture_state())
            )  # a copy; what a checkpoint could not hold fails here, too
            if placed.keep(run.step, list(run.plan.changing_roles)):
                self._snapshot = Snapshot(run.step, state, run.engine_states(), get_random_states())

    def restore(self) -> None:
        """Continue from the snapshot or the newest valid checkpoint; from the start if there is neither.

        Raises:
            UsageError: there are checkpoints, but each is damaged, or another strategy wrote them.
            WorkerLost: the snapshot is lost with the nodes that held it.
        """
        run, snapshot = self.run, self._snapshot
        newest = max((step_number(folder) for folder in list_checkpoints(run.output)), default=-1)
        if snapshot is not None and snapshot.step >= newest and run.placed is not None:
            self._snapshot = None  # if it is lost, the next life begins at the checkpoint
            run.placed.give_back(snapshot.step, list(run.plan.changing_roles))
            self._continue_from(json.loads(json.dumps(snapshot.state)), snapshot.engine_states)
            set_random_states(snapshot.random_states)
            self._snapshot = snapshot
        elif (found := run.checkpoints.restore(run.changing_roles, run.world)) is not None:
            self._continue_from(*found)
        elif self.revives:
            run.sync_engine(run.changing_roles)  # engines have weights of the life before
        if self.revives:
            log.warning(f"continuing after step {run.step}")
            self._count({"recovered/roles": 1.0, "recovered/seconds": current_time() - self._died})
            self._died = 0.0
        for step in [each for each in self._told if each > run.step]:
            self._count(self._told.pop(step))

    def recoveries(self) -> dict[str, float]:
        """Return the recoveries for the line of the step that ends: those that no line has yet, or whose line was cut."""
        assert self.run.placed is not None
        self._count(self.run.placed.recoveries())
        metrics, self._counts = self._counts, {}
        if any(metrics.values()):
            self._told[self.run.step] = metrics
        return dict(metrics)

    def _count(self, metrics: Mapping[str, float]) -> None:
        """Add to what the next line will have."""
        for name, value in metrics.items():
            self._counts[name] = self._counts.get(name, 0.0) + value

    def _continue_from(self, state: Mapping[str, Any], engine_states: Mapping[str, Any]) -> None:
        """Take over the state of a step, whose roles are as they were then."""
        run = self.run
        run.state.load_state_dict(state)
        run.engines.load_state_dict(engine_states)
        for name, role in run.changing_roles.items():
            role.version = run.state.versions[name]
        run.stream.load_state_dict(run.state.stream)
        run.sync_engine(run.changing_roles)
