"""Sampling in a thread, so that a test can do something meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.training.local_role import LocalRole
from rlhf_rollout_vllm.engine import VLLMEngines

SECONDS = 300.0


class BackgroundSampling:
    """Samples in a thread while the block runs, and until it is done."""

    rollouts: Rollouts

    def __init__(self, engine: VLLMEngines, role: LocalRole, prompts: Prompts, sampling: Sampling) -> None:
        self.thread = threading.Thread(target=self._run, args=(engine, role, prompts, sampling))

    def _run(self, engine: VLLMEngines, role: LocalRole, prompts: Prompts, sampling: Sampling) -> None:
        self.rollouts = engine(role, prompts, sampling)

    def __enter__(self) -> BackgroundSampling:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Return as soon as `condition` holds; fail after the deadline."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
