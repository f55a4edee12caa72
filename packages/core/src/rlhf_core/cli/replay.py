"""`rlhf-run replay RUN STEP`: reward, credit and loss of a recorded step again, without a model or an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rlhf_core.contract.commands import Command
from rlhf_core.errors import UsageError

if TYPE_CHECKING:
    from rlhf_core.contract.commands import CommandContext
    from rlhf_core.plugins.registry import Registry

__all__ = ["Replay"]


@dataclass(frozen=True)
class Replay(Command):
    """Compute reward, credit and loss of a recorded step again, and name the first number that differs."""

    run: str
    """OUTPUT of a run that recorded steps"""
    step: str
    """number of the step"""
    config: str = ""
    """configuration in place of the run's, to find the first number that another option changes"""

    def __call__(self, context: CommandContext) -> int:
        from rlhf_core.config.builder import parse
        from rlhf_core.run.replaying import read_step, replay_step

        if not self.step.isdigit():
            raise UsageError(f"STEP must be the number of a step, not {self.step!r}")
        output, step = Path(self.run), int(self.step)
        kept = read_step(output, step)
        registry = cast("Registry", context.registry)
        config = parse(["--config", self.config or str(output / "config.toml"), "--output", str(output)], registry)
        counts = replay_step(config, registry, step, kept)
        parts = [
            f"{count} {'numbers of ' if kind != 'metric' else ''}{kind}{'s' * (kind == 'metric')}"
            for kind, count in counts.items()
        ]
        print(f"step {step} is as recorded: {', '.join(parts)} are equal to 1e-9")
        return 0
