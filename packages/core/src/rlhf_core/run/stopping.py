"""The reasons for a run to end before its last step: a signal, an observer's wish, an observer's alarm. Ranks agree on them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.errors import RunStopped, run_option

if TYPE_CHECKING:
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.run.signals import StopSignals

__all__ = ["Stop", "describe_resuming"]


def describe_resuming(config: RunConfig) -> str:
    """Return how the user continues the run: a complete command, or from Python the options to pass."""
    if config.option_names.language == "flags":
        plugins = config.registry.selection.words if config.registry is not None else []
        words = ["rlhf-run", *plugins, "--config", str(Path(config.output) / "config.toml")]
        return f"{shlex.join(words)} {run_option('resume', True)}"
    return f"{run_option('resume', True)} {run_option('output', config.output)}"


@dataclass
class Stop:
    """Reason to end the run after the current step."""

    asked: bool = False
    """True if an observer returned True or a text"""
    alarm: str = ""
    """the text of the first observer that returned one"""
    exit_code: int = 0
    """exit code of a signal that any rank received; 0 for none"""

    def __bool__(self) -> bool:
        return self.asked or self.exit_code > 0

    def agree(self, answers: Sequence[Any], signals: StopSignals, world: World) -> None:
        """Collect the answers of the observers of every rank after a step, and the signals. Collective."""
        alarm = next((answer for answer in answers if isinstance(answer, str)), "")
        ranks = world.gather((any(answers), alarm, signals.exit_code))
        self.asked = any(asked for asked, _, _ in ranks)
        self.alarm = next((text for _, text, _ in ranks if text), "")
        self.exit_code = max(code for *_, code in ranks)

    def check(self, signals: StopSignals, world: World, step: int, config: RunConfig) -> None:
        """Raise if the run was cut short, once everything is saved. Collective.

        Args:
            signals: those that this process received.
            world: the ranks of the run.
            step: the last one.
            config: the run's.

        Raises:
            RunStopped: a signal came, or an observer gave a reason.
        """
        self.exit_code = max(world.gather(signals.exit_code))  # of the last save too
        done = f"step {step} of {config.steps}"
        if self.exit_code:
            raise RunStopped(f"stopped after {done}; continue with {describe_resuming(config)}", self.exit_code)
        if self.alarm:
            raise RunStopped(f"stopped after {done}, which is saved: {self.alarm}")
