"""`rlhf-run simulate`: step times against what they are by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core.asynchronous.simulation import Workload, simulate
from rlhf_core.cli import main


@pytest.mark.parametrize(("generation", "training"), [(1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (1.0, 3.0)])
def test_one_step_ahead_hides_the_shorter_phase_behind_the_longer_one(generation: float, training: float) -> None:
    workload = Workload(generation, training, sync=0.1, steps=50)
    in_turn, ahead = simulate(workload, 0), simulate(workload, 1)
    assert in_turn.step == pytest.approx(generation + training + 0.1)
    assert ahead.step == pytest.approx(max(generation, training) + 0.1)
    assert in_turn.overlap(workload) == pytest.approx(0.0)
    assert ahead.overlap(workload) == pytest.approx(1.0)
    assert set(in_turn.ages) == {0}
    assert set(ahead.ages[1:]) == {1}


def test_idle_shares_are_what_the_longer_phase_leaves() -> None:
    outcome = simulate(Workload(4.0, 1.0, steps=1000), 1)
    assert outcome.idle_trainer == pytest.approx(0.75, abs=0.002)
    assert outcome.idle_sampler == pytest.approx(0.0, abs=0.002)


def test_generation_times_have_the_mean_that_was_asked_for() -> None:
    times = Workload(10.0, 1.0, spread=0.3, steps=20_000).generation_times()
    assert sum(times) / len(times) == pytest.approx(10.0, rel=0.01)
    assert len(set(times)) > 19_000


@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 5])
def test_staleness_stays_within_the_bound_whatever_the_times_are(ahead: int) -> None:
    outcome = simulate(Workload(3.0, 2.0, sync=0.2, spread=1.0, steps=300, updates=4), ahead)
    assert max(outcome.ages) <= 4 * ahead
    assert outcome.step_ends == sorted(outcome.step_ends)


def test_the_command_prints_a_line_per_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--generation", "10", "--training", "10", "--ahead", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["ahead", "s/step", "speedup"]
    assert [line.split()[:3] for line in lines] == [
        ["0", "20.00", "1.00x"],
        ["1", "10.00", "2.00x"],
        ["2", "10.00", "2.00x"],
    ]


def test_weights_that_are_ready_go_before_the_next_call() -> None:
    # by hand: 20 s calls, 10 s updates. Each update ends within a call, so the next call has its weights
    assert set(simulate(Workload(20.0, 10.0, sync=0.5, steps=50), 2).ages[1:]) == {1}
    assert set(simulate(Workload(10.0, 20.0, sync=0.5, steps=50), 2).ages[2:]) == {2}


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[4] / "docs" / "asynchronous.md").read_text(encoding="utf-8")
    command, _, shown = page.partition("$ rlhf-run simulate ")[2].partition("```")[0].partition("\n")
    assert main(["simulate", *command.split()]) == 0
    assert capsys.readouterr().out == shown


def test_a_phase_without_time_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--training", "0"]) == 2
    assert "nothing overlaps" in capsys.readouterr().err
