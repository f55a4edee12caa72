"""An alarm says when KL, length, entropy or another metric has left its band, and stops the run if asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_core import Prompts, Rollouts, Run
from rlhf_core.contract.options import Sampling
from rlhf_core.contract.roles import Role
from rlhf_core.errors import RunStopped, UsageError
from rlhf_core.observer.alarm import Alarm
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import check_observer, tiny_run


def said(alarm: Alarm, rows: Sequence[Mapping[str, float]], tmp_path: Path) -> list[Any]:
    """Return the alarm's answers at each step of a run with these metrics."""
    run: Any = SimpleNamespace(output=tmp_path, step=0)
    watch = alarm(run)
    watch.rlhf_run_start(run)
    return [watch.rlhf_step_end(run, step, metrics) for step, metrics in enumerate(rows, start=1)]


def test_one_line_after_so_many_steps_outside_in_a_row_and_one_when_it_is_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [0.1, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9, 0.3, math.nan, math.nan]
    said(Alarm(kl=(0, 0.5), entropy=None, patience=2), [{"kl/mean": value} for value in values], tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "rlhf-run: alarm: kl/mean is 0.9, outside 0 to 0.5, since step 4; look at samples.jsonl",
        "rlhf-run: kl/mean is back in its band at step 8: 0.3",
        "rlhf-run: alarm: kl/mean is nan, outside 0 to 0.5, since step 9; look at samples.jsonl",
    ]
    logged = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(row["step"], row["metric"]) for row in logged] == [(5, "kl/mean"), (10, "kl/mean")]


def test_every_metric_can_have_a_band_and_its_ends_belong_to_it(tmp_path: Path) -> None:
    alarm = Alarm(None, None, None, None, more={"loss/actor": "-1:3"}, patience=1, action="stop")
    answers = said(alarm, [{"loss/actor": value} for value in (-1.0, 3.0, 3.1)], tmp_path)
    assert answers[:2] == [None, None]
    assert answers[2].startswith("loss/actor is 3.1, outside -1 to 3, since step 3")


def test_a_resumed_run_counts_on_from_where_it_was(tmp_path: Path) -> None:
    """Steps 1 and 2 were outside; so, with patience 3, step 3 is the one that stops it, as without the interruption."""
    rows = [{"step": step, "kl/mean": 0.9} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "kl')
    run: Any = SimpleNamespace(output=tmp_path, step=2)  # the checkpoint is of step 2
    watch = Alarm(kl=(0, 0.5), patience=3, action="stop")(run)
    watch.rlhf_run_start(run)
    assert "since step 1" in str(watch.rlhf_step_end(run, 3, rows[2]))


@dataclass(frozen=True)
class Collapses(HuggingFaceRollout):
    """Samples ever shorter completions: a planted collapse."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rollouts = super().__call__(role, prompts, sampling)
        return rollouts if role.version < 2 else rollouts.rows(torch.arange(len(rollouts))) and _cut(rollouts)


def _cut(rollouts: Rollouts) -> Rollouts:
    rollouts.lengths_N = torch.ones_like(rollouts.lengths_N)
    rollouts.mask_NT[:, 1:] = False
    return rollouts


def planted(output: Path, **options: Any) -> Run:
    return tiny_run(output, rollout=Collapses(), steps=6, **options)


def test_a_run_whose_completions_collapse_is_stopped_with_its_step_saved(tmp_path: Path) -> None:
    with pytest.raises(RunStopped) as caught:
        planted(tmp_path, observer=Alarm(None, (2, 100), None, patience=2, action="stop")).train()
    assert caught.value.exit_code == 1
    assert str(caught.value) == (
        "stopped after step 4 of 6, which is saved: completion/length is 1, outside 2 to 100, since step 3; look at "
        "samples.jsonl, and continue with resume=True"
    )
    assert (tmp_path / "checkpoints" / "step-4" / "manifest.json").exists()


def test_a_run_is_only_warned_about_where_that_is_asked_and_a_healthy_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted(tmp_path / "ill", observer=Alarm(None, (2, 100), None, patience=2)).train()
    assert capsys.readouterr().err.count("alarm: completion/length") == 1
    tiny_run(tmp_path / "well", observer=Alarm(length=(0.5, 100))).train()
    assert "alarm" not in capsys.readouterr().err


def test_entropy_is_that_of_the_distribution_that_was_sampled(tmp_path: Path) -> None:
    """An untrained model of 259 tokens is nearly uniform: log 259 nats per token."""
    run = tiny_run(tmp_path, batch_size=8, sampling={"n": 8, "max_new_tokens": 16}, steps=1)
    metrics = run.train().metrics
    assert metrics["completion/entropy"] == pytest.approx(math.log(len(run.encoder.tokenizer)), rel=0.02)


def test_bands_that_cannot_be_are_refused() -> None:
    for options in ({"kl": (1, 0)}, {"patience": 0}, {"more": {"x": "1"}}, {"kl": None, "entropy": None}):
        with pytest.raises(UsageError):
            Alarm(**options)  # type: ignore[arg-type]


def test_an_alarm_keeps_the_contract_of_observers() -> None:
    check_observer(Alarm())
