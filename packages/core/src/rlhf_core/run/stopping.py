"""The reasons for a run to end before its last step: a signal, an observer's wish, an observer's alarm. Ranks agree on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import RunStopped, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World
    from rlhf_core.run.signals import StopSignals

__all__ = ["Stop"]


@dataclass
class Stop:
    """Why the run ends after the step at hand."""

    asked: bool = False
    """an observer returned True or a text"""
    alarm: str = ""
    """the text of the first observer that returned one"""
    exit_code: int = 0
    """of a signal that any rank received; 0 for none"""

    def __bool__(self) -> bool:
        return self.asked or self.exit_code > 0

    def agree(self, answers: Sequence[Any], signals: StopSignals, world: World) -> None:
        """Take in what the observers of every rank answered after a step, and the signals. Collective."""
        alarm = next((answer for answer in answers if isinstance(answer, str)), "")
        ranks = world.gather((any(answers), alarm, signals.exit_code))
        self.asked = any(asked for asked, _, _ in ranks)
        self.alarm = next((text for _, text, _ in ranks if text), "")
        self.exit_code = max(code for *_, code in ranks)

    def check(self, signals: StopSignals, world: World, done: str, output: object) -> None:
        """Raise if the run was cut short, once everything is saved. `done` is how far it came. Collective.

        Raises:
            RunStopped: a signal came, or an observer gave a reason.
        """
        self.exit_code = max(world.gather(signals.exit_code))  # of the last save too
        if self.exit_code:
            raise RunStopped(
                f"stopped after {done}; continue with {run_option('resume', True)} {run_option('output', output)}",
                self.exit_code,
            )
        if self.alarm:
            raise RunStopped(f"stopped after {done}, which is saved: {self.alarm}")
