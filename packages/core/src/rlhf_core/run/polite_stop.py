"""A requested stop, from the signal to the exit code, also of a run that does not end on its own.

The step at hand has `--stop-within` seconds. If it is not over then, it is given up, and the step before it is saved where
nothing has changed since: one process, no role updated, no engine with its own state, no sampler that reacts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import RlhfError, RunStopped
from rlhf_core.run.failures import newest_checkpoint
from rlhf_core.run.signals import exit_on_preemption
from rlhf_core.run.stop_watch import StopOverdue
from rlhf_core.run.stopping import describe_resuming
from rlhf_core.util.messages import log
from rlhf_core.util.random_states import get_random_states, set_random_states

if TYPE_CHECKING:
    from rlhf_core.run.run import Run

__all__ = ["Rest", "end_in_time", "give_up_in_time"]

UNTRAINED = ("data", "rollout", "reward", "needs", "credit")
"""Phases of a step in which no weight changes."""


@dataclass(frozen=True)
class Rest:
    """State that a step changes before its roles update: enough to undo the step."""

    random_states: dict[str, Any]
    versions: dict[str, int]
    """optimizer steps of each changing role"""

    @classmethod
    def take(cls, run: Run) -> Rest:
        """Return the rest of `run` between two steps."""
        return cls(get_random_states(), _versions(run))


@contextmanager
def end_in_time(run: Run) -> Iterator[None]:
    """Around all of a run: keep the time of a stop, and turn what the stop breaks into `RunStopped`."""
    with exit_on_preemption(run.config.option_names), run.signals.watch:
        try:
            yield
        except StopOverdue:
            raise RunStopped(_describe(run, "the run did not close"), run.signals.exit_code) from None
        except Exception as error:
            if isinstance(error, RlhfError) or run.signals.received is None or run.world.size == 1:
                raise
            told = f"another rank ended first ({type(error).__name__})"  # the wait for it failed
            raise RunStopped(_describe(run, told), run.signals.exit_code) from error


@contextmanager
def give_up_in_time(run: Run) -> Iterator[None]:
    """Around the steps: receive signals; after the steps, and after one that is given up, time begins anew for saving."""
    with run.signals:
        try:
            yield
        except StopOverdue:
            run.signals.watch.restart()
            if _is_unchanged(run):
                set_random_states(run.rest.random_states)
                run.save()
                run.checkpoints.background.wait()
                log.warning(f"step {run.step + 1} was abandoned; step {run.step} is saved")
            late = f"step {run.step + 1} ({run.meter.doing}) did not end"
            raise RunStopped(_describe(run, late), run.signals.exit_code) from None


def _is_unchanged(run: Run) -> bool:
    """Return True if the last finished step can be saved: the step at hand has changed nothing but random states."""
    return (
        run.step > 0
        and run.world.size == 1
        and run.meter.doing in UNTRAINED
        and run.rest.versions == _versions(run)
        and not run.stream.reacts
        and set(run.engines.state_dict()) <= set(run.state.readers)
    )


def _versions(run: Run) -> dict[str, int]:
    return {name: run.roles[name].version for name in run.plan.changing_roles}


def _describe(run: Run, late: str) -> str:
    """Return the line that the run ends with."""
    name = run.signals.received.name if run.signals.received is not None else "the signal"
    seconds = f"{run.signals.watch.seconds:g} s of {name}"
    return f"{late} within {seconds}, and {newest_checkpoint(run)}; continue with {describe_resuming(run.config)}"
