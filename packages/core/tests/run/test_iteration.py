"""An iteration owns its step: it may be collected before the one in front is trained on, and leaves no trace until then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.loop import collect, credit, update
from rlhf_core.run.iteration import Iteration, Services
from rlhf_core.run.run import Run
from rlhf_core.testing import tiny_rollouts, tiny_run

MODEL = "tiny:hidden=16,layers=1"
SERVICES = [name for name in vars(Services) if not name.startswith("_")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with tiny_run(tmp_path, model=MODEL, steps=3).open() as opened:
        yield opened


def begun(run: Run, step: int) -> Iteration:
    """A collected iteration that has the services of `run`, and cannot reach anything else of it."""
    services: Any = SimpleNamespace(**{name: getattr(run, name) for name in SERVICES})
    iteration = Iteration(services, step, 0.0, {})
    iteration.begin()
    collect(iteration)
    return iteration


def test_collecting_needs_the_services_of_a_run_and_changes_nothing_of_its_state(run: Run) -> None:
    before = run.state.state_dict()
    iteration = begun(run, 1)
    assert run.state.state_dict() == before
    assert run.meter.take() == {}
    assert set(iteration.batches) == set(iteration.rewards) == {"actor"}
    assert iteration.batches["actor"].step.number == 1


def test_an_iteration_collected_ahead_changes_neither_the_one_before_it_nor_its_checkpoint(tmp_path: Path) -> None:
    """Step 2 is collected before step 1 is trained on: step 1 gives the numbers and the checkpoint of a run in order."""
    plain = tiny_run(tmp_path / "plain", model=MODEL, steps=1)
    plain.train()
    run = tiny_run(tmp_path / "ahead", model=MODEL, steps=3)
    with run.open():
        first, second = begun(run, 1), begun(run, 2)
        assert first.batches["actor"].prompts != second.batches["actor"].prompts
        credited = credit(run, first)
        update(run, first, credited)
        run.finish(first, credited)
        untimed = [
            {name: value for name, value in metrics.items() if not name.startswith(("time/", "speed/", "memory/"))}
            for metrics in (run.last_metrics, plain.last_metrics)
        ]
        assert untimed[0] == untimed[1]
        assert run.state.stream == plain.state.stream == first.position != second.position


def test_an_error_surfaces_at_the_iteration_that_had_it(run: Run) -> None:
    """The first iteration is trained on; the second fails while its rewards are computed, and the run knows the phase."""
    collected: list[int] = []

    def failing(iteration: Any) -> None:
        if iteration.step == 2:
            with iteration.meter.phase("reward"):
                raise RuntimeError("no reward")
        collect(iteration)
        collected.append(iteration.step)

    iterations = run.iterations(failing)
    first = next(iterations)
    run.finish(first, credit(run, first))
    with pytest.raises(RuntimeError, match="no reward"):
        next(iterations)
    assert collected == [1] and run.step == 1
    assert run.meter.doing == "reward"


def test_rows_of_rewards_are_picked_and_joined_with_their_completions() -> None:
    rollouts = tiny_rollouts()
    N, T = rollouts.tokens_NT.shape
    rewards_NT = torch.where(rollouts.mask_NT, torch.arange(N * T).reshape(N, T).float(), 0.0)
    rewards = RewardOutput(torch.arange(N).float(), rewards_NT, torch.arange(N) / N, {"twice": 2.0 * torch.arange(N)})
    scored = ScoredRollouts(rollouts, rewards)
    short, long = rollouts.lengths_N.argsort()[[0, -1]].tolist()
    parts = [scored.rows([short]), scored.rows([long, short])]
    joined = ScoredRollouts.cat(parts)
    assert parts[0].rewards.rewards_NT is not None and joined.rewards.rewards_NT is not None
    assert parts[0].rewards.rewards_NT.shape == (1, int(rollouts.lengths_N[short]))
    assert joined.rollouts.texts == [rollouts.texts[i] for i in (short, long, short)]
    assert joined.rewards.rewards_N.tolist() == [short, long, short]
    assert joined.rewards.metrics["twice"].tolist() == [2.0 * short, 2.0 * long, 2.0 * short]
    for row, i in enumerate((short, long, short)):
        length = int(rollouts.lengths_N[i])
        assert joined.rewards.rewards_NT[row, :length].tolist() == rewards_NT[i, :length].tolist()
        assert not joined.rewards.rewards_NT[row, length:].any()
    assert joined.rewards.total_N.tolist() == [float(rewards.total_N[i]) for i in (short, long, short)]
