"""Rollout engines into whose calls an update is planted, for runs whose workers find them by `ray_planted:Planted`.

From an engine's second call on, each call marks that it is in the middle, by a file, and continues when new weights are there.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.contract.providers import Rollout
from rlhf_core.rollout import fake
from rlhf_core.rollout.fake import FakeEngine, FakeRollout
from rlhf_core.rollout.hf import HuggingFaceRollout

AT = 3  # token of a call from which on the new weights sample
SECONDS = 120.0


def wait_until(holds: Callable[[], Any]) -> None:
    """Wait, with a deadline."""
    ends = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < ends, "nothing came"
        time.sleep(0.005)


def mark(folder: str, version: int) -> None:
    """Let the controller know that this engine is in the middle of a call that began with these weights."""
    (Path(folder) / f"inside-{version}-{os.getpid()}").touch()


class Halfway:
    """A role whose forward pass AT of a call waits for new weights. The rest is the role's.

    Args:
        role: the role.
        options: of the engine.
    """

    def __init__(self, role: Any, options: Planted) -> None:
        self.role, self.options, self.passes = role, options, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.role, name)

    def refresh(self, change: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
        if self.passes == AT:
            mark(self.options.folder, self.role.version)
            wait_until(lambda: self.role._pending is not None)
            self._die()
        self.passes += 1
        return int(self.role.refresh(change))

    def _die(self) -> None:
        """End this process with the weights in it that were not taken, if it is the first to do so in the step."""
        died = Path(self.options.folder) / "died"
        if self.role.version == self.options.dies_at and not died.exists():
            try:
                died.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Planted(HuggingFaceRollout):
    """`hf` with planted updates."""

    folder: str = ""
    """folder of marks"""
    dies_at: int = -1
    """version of the weights with which a call begins in which one engine dies"""

    def open(self, context: Any) -> Any:
        return PlantedEngine(HuggingFaceRollout().open(context), self)


class PlantedEngine(Rollout):
    def __init__(self, engine: Any, options: Planted) -> None:
        self.engine, self.options, self.calls = engine, options, 0

    def __call__(self, role: Any, prompts: Any, sampling: Any) -> Any:
        self.calls += 1
        return self.engine(Halfway(role, self.options) if self.calls > 1 else role, prompts, sampling)

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class PlantedFake(FakeRollout):
    """`fake` with planted updates."""

    folder: str = ""
    """folder of marks"""

    def open(self, context: Any) -> FakeEngine:
        Call.folder = self.folder
        fake._Call = Call  # type: ignore[misc]
        return super().open(context)


class Call(fake._Call):
    """A call that takes no time of its own: its token AT is the first after the update."""

    folder = ""
    calls = 0

    def wait(self, seconds: float) -> None:
        Call.calls += 1
        if Call.calls > 1:
            mark(self.folder, self.versions[0])
            wait_until(lambda: len(self.since) > 1)

    def take(self, w: float, version: int, seconds: float) -> None:
        self.w.append(w)
        self.versions.append(version)
        self.since.append(AT - 0.5)  # tokens take a second each
