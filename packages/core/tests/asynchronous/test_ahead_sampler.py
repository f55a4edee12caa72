"""A sampler that reacts to scores, with steps sampled ahead: a checkpoint has what it had learned by the right step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core import Registry, Run, Sampler, hookimpl
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.util.clock import simulated_time

STEPS, P = 6, 2


@dataclass(frozen=True)
class Wandering(Sampler):
    """The next rows follow from every score so far."""

    def open(self, context: object) -> WanderingEngine:
        return WanderingEngine()


@dataclass(frozen=True)
class FarSighted(Wandering):
    """It draws two batches before their turn; a checkpoint holds them."""

    lookahead: ClassVar[int] = 2


class WanderingEngine:
    def __init__(self) -> None:
        self.state = 1

    def __call__(self, rows: int, seed: int) -> Iterator[int]:
        while True:
            self.state = (self.state * 48271 + 11) % 2147483647
            yield self.state % rows

    def update(self, row_N: torch.Tensor, scores_N: torch.Tensor) -> None:
        self.state = (self.state + int(1000 * scores_N.sum().abs()) + int(row_N.sum())) % 2147483647

    def state_dict(self) -> Mapping[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state["state"]

    def close(self) -> None: ...


class Watch:
    def __init__(self, fail_at: int = 0) -> None:
        self.fail_at = fail_at
        self.rows: dict[int, list[int]] = {}

    @hookimpl
    def rlhf_before_update(self, run: Run) -> None:
        if run.step + 1 == self.fail_at:
            raise KeyboardInterrupt("killed")

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        (batch,) = run.samples.values()
        self.rows[step] = batch["row_N"].tolist()


def wander(output: Path, watch: Watch, ahead: int, sampler: Sampler, **options: Any) -> dict[int, list[int]]:
    registry = Registry()
    registry.register(watch, name="watch")
    with simulated_time():
        tiny_run(
            output,
            registry=registry,
            sampler=sampler,
            reward="length",
            rollout={"use": "fake", "token_seconds": 0.1},
            strategy={"use": "fake", "step_seconds": 1.0},
            steps=STEPS,
            batch_size=P,
            save_every=1,
            ahead=ahead,
            **options,
        ).train()
    return watch.rows


@pytest.mark.parametrize("sampler", [Wandering(), FarSighted()], ids=["reacts at once", "looks ahead"])
@pytest.mark.parametrize("step", [2, 4, STEPS])
def test_a_resumed_run_draws_the_rows_that_the_scores_of_trained_steps_lead_to(
    tmp_path: Path, step: int, sampler: Sampler
) -> None:
    straight = wander(tmp_path / "straight", Watch(), ahead=2, sampler=sampler)
    assert straight == wander(tmp_path / "in-turn", Watch(), ahead=0, sampler=sampler), (
        "steps are scored in order, however far ahead"
    )
    killed = Watch(step)
    with pytest.raises(KeyboardInterrupt):
        wander(tmp_path / "run", killed, ahead=2, sampler=sampler)
    resumed = wander(tmp_path / "run", Watch(), ahead=2, sampler=sampler, resume=True)
    assert min(resumed) == step
    assert {**killed.rows, **resumed} == straight
