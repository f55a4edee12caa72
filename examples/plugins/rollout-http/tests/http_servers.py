"""Servers for the tests: the package's own in a thread, and some that are wrong in one way each; and a run that uses one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from rlhf_core import Reward, Rollouts, Run, make_config
from rlhf_rollout_http.server import EngineServer

__all__ = ["Altered", "Forgetful", "Late", "Small", "curve", "make_model", "slow", "train", "up"]


@dataclass(frozen=True)
class Small(Reward):
    """Rewards small token ids, so that completions of one length differ."""

    def __call__(self, rollouts: Rollouts) -> list[float]:
        sums_N = (rollouts.tokens_NT * rollouts.mask_NT).sum(1)
        return [1 - total / (256 * length) for total, length in zip(sums_N.tolist(), rollouts.lengths_N.tolist())]


SAMPLING = {"n": 4, "max_new_tokens": 6}
GRPO = {"reward": Small(), "batch_size": 2, "sampling": SAMPLING}


@contextmanager
def up(server: EngineServer) -> Iterator[EngineServer]:
    """Serve in a thread until the end."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class Forgetful(EngineServer):
    """Takes the first weights, then says that it takes others and samples from the first."""

    def take(self, engine: Any, tensors: Any, version: int, last: bool) -> None:
        if version == 0:
            engine.take(tensors)
        if last:
            engine.version = version


class Late(EngineServer):
    """Takes the first weights and no others, and reports the version that it has."""

    def take(self, engine: Any, tensors: Any, version: int, last: bool) -> None:
        if version == 0:
            super().take(engine, tensors, version, last)


class Altered(EngineServer):
    """Changes each sampled answer by `change`, after `healthy` right ones."""

    def __init__(self, folder: str, change: Callable[[Any], Any], healthy: int = 0) -> None:
        super().__init__(folder)
        self.change, self.healthy = change, healthy

    def answer(self, method: str, path: str, query: Any, body: bytes) -> dict[str, Any]:
        found = super().answer(method, path, query, body)
        if not path.endswith("/sample"):
            return found
        self.healthy -= 1
        return found if self.healthy >= 0 else self.change(found)


def make_model(output: Path) -> str:
    """Export a small model and return its folder."""
    Run(make_config("grpo", model="tiny:hidden=16,layers=1", **GRPO, steps=0, output=str(output))).train()
    return str(output / "model")


def train(model: str, output: Path, rollout: Any, steps: int = 3, **options: Any) -> list[dict[str, float]]:
    """Run grpo at a large learning rate and return the metrics of its steps."""
    config = make_config(
        "grpo",
        model=model,
        rollout=rollout,
        steps=steps,
        output=str(output),
        **{**GRPO, "actor": {"optim": {"lr": 1e-2}}, **options},
    )
    Run(config).train()
    return curve(output)


def curve(output: Path) -> list[dict[str, float]]:
    """Read the metrics of a run's steps, without times and what only one engine logs."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    machine = ("time/", "sync/", "speed/", "memory/")
    return [{name: value for name, value in row.items() if not name.startswith(machine)} for row in rows]


def slow(answer: Any) -> Any:
    """Answer after the deadline of the tests."""
    time.sleep(3)
    return answer
