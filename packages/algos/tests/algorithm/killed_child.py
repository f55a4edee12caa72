"""One attempt at a run, for `test_kill`: a module of its own, since a forked server can only call what it can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["At", "train", "train_ranks", "train_until"]

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def train(options: dict[str, Any], when: Callable[[int], bool] | None, count: Path | None) -> None:
    """One attempt at the run, in a process of its own. `when` says at which file operation to die; `count` gets how many
    there were, and the seconds it all took."""
    import torch

    from rlhf_core import Run, make_config

    torch.set_num_threads(1)
    began = time.monotonic()
    output, seen = options["output"], 0
    sys.stderr = Path(f"{output}.log").open("a")  # noqa: SIM115 (open for the life of the process)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(args[0]).startswith(output):
            seen += 1
            if when is not None and when(seen):
                os.kill(os.getpid(), signal.SIGKILL)

    config = make_config(**options)
    sys.addaudithook(audit)
    Run(config).train()
    if count is not None:
        count.write_text(f"{seen} {time.monotonic() - began}")


def train_until(options: dict[str, Any], hook: str, folder: Path) -> None:
    """Train in the working folder `folder`, and die at the first call of an observer hook."""
    from rlhf_core import Run, make_config
    from rlhf_core.contract.hooks import hookimpl
    from rlhf_core.plugins.registry import Registry

    class Kill:
        pass

    def die(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    kill = Kill()
    setattr(kill, hook, hookimpl(die))
    registry = Registry()
    registry.register(kill, "kill")
    os.chdir(folder)
    Run(make_config(**options), registry).train()


def train_ranks(options: dict[str, Any], kill_in_step: int = 0) -> None:
    """Begin or continue a run as one of several ranks, each of which dies before its update in a step, if one is given."""
    from rlhf_core import Run, make_config
    from rlhf_core.contract.hooks import hookimpl
    from rlhf_core.plugins.registry import Registry

    class Kill:
        all_ranks = True

        @hookimpl
        def rlhf_before_update(self, run: Run) -> None:
            if run.step == kill_in_step - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    registry = Registry()
    registry.register(Kill(), "kill")
    Run(make_config(**options, resume="auto"), registry).train()


class At:
    """Predicate for the file operation at which the process dies."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, number: int) -> bool:
        return number == self.number
