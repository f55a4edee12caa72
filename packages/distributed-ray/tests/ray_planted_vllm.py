"""vLLM in a process of its own, into whose calls an update is planted, for workers that find it by `ray_planted_vllm:Planted`.

From the second call on, sampling begins when the weights of the step are there, and these wait until it is under way.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from ray_planted import SECONDS, mark, wait_until

from rlhf_rollout_vllm.engine import VLLM, VLLMEngines


@dataclass(frozen=True)
class Planted(VLLM):
    """`vllm` with planted updates."""

    folder: str = ""
    """folder of marks"""
    last: int = 0
    """version of the weights that come when nothing is sampled any more"""

    def open(self, context: Any) -> VLLMEngines:
        return PlantedEngines(self, ahead=True)


class PlantedEngines(VLLMEngines):
    calls = 0

    def __init__(self, options: Planted, ahead: bool) -> None:
        super().__init__(options, ahead)
        self.folder, self.last, self.go = options.folder, options.last, threading.Event()

    def __call__(self, role: Any, prompts: Any, sampling: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            mark(self.folder, role.version)
            assert self.go.wait(SECONDS)
            self.go.clear()
        return super().__call__(role, prompts, sampling)

    def sync(self, role: Any) -> Any:
        if role.version < self.last:
            host: Any = self.engines[role.name].host
            self.go.set()
            wait_until(lambda: host._waiting > 0)
            time.sleep(0.1)
        return super().sync(role)
