"""Sampling ahead, whole runs on the rollout `fake` and the strategy `fake` in simulated time: every number by hand.

The policy is one number w, and the log-probability of a token is a constant plus w. A token that the number w' sampled has
the importance weight exp(w - w') when w begins to train, bounded by 2, and the gradient is minus the weighted mean advantage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Registry, Run, hookimpl, make_config
from rlhf_core.cli import main
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.rollout.fake import FakeEngine
from rlhf_core.util.clock import current_time, simulated_time

LR, STEPS, N, P = 0.5, 6, 4, 4


class Watch:
    """Records of each step's training rows and the number after it; may end the run or raise."""

    def __init__(self, fail_at: tuple[str, int] = ("", 0)) -> None:
        self.fail_at = fail_at
        self.uids: dict[int, list[int]] = {}
        self.lengths: dict[int, list[list[int]]] = {}
        self.masked: dict[int, int] = {}
        self.w: dict[int, float] = {}

    def fail(self, where: str, step: int) -> None:
        if (where, step) == self.fail_at:
            raise KeyboardInterrupt(f"{where} {step}")

    @hookimpl
    def rlhf_rollouts_ready(self, run: Run) -> None:
        self.fail("ready", run.step + 1)

    @hookimpl
    def rlhf_before_update(self, run: Run) -> None:
        self.fail("update", run.step + 1)

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        self.fail("end", step)
        (batch,) = run.samples.values()
        flat = batch.lengths_N.tolist()
        self.uids[step] = list(dict.fromkeys(batch["uids_N"].tolist()))
        self.lengths[step] = [flat[i : i + N] for i in range(0, len(flat), N)]
        self.masked[step] = int(batch.lengths_N.sum() - batch.mask_NT.sum())
        self.w[step] = float(run.roles["actor"].trainable.w.detach())  # type: ignore[attr-defined]


def run_fakes(output: Path, watch: Watch | None = None, generation: float = 0.1, **options: Any) -> Watch:
    """A run of GRPO on the two fakes: 1 s per update, `generation` s per decoding step of up to 12."""
    registry, watch = Registry(), watch or Watch()
    registry.register(watch, name="watch")
    config = make_config(
        {"use": "grpo", "kl": {"coef": 0.0}},
        model="tiny",
        rollout={"use": "fake", "token_seconds": generation},
        strategy={"use": "fake", "step_seconds": 1.0},
        advantage="rloo",
        reward={"use": "length", "target": 4},
        sampling={"n": N, "max_new_tokens": 12},
        actor={"optim": {"lr": LR}},
        output=str(output),
        **{"loss": "dapo", "batch_size": P, "steps": STEPS, **options},
    )
    with simulated_time():
        Run(config, registry).train()
        watch.seconds = current_time()  # type: ignore[attr-defined]
    return watch


def metrics(output: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "iterations.jsonl").read_text().splitlines()]


def by_hand(
    lengths: Mapping[int, list[list[int]]], ages: list[int], most: float = 2.0, corrects: bool = True
) -> list[float]:
    """w after every step, where the tokens of step s are `ages[s - 1]` updates old, in float64."""
    w = [0.0]
    for groups, age in zip(lengths.values(), ages, strict=True):
        weight = min(math.exp(w[-1] - w[-1 - age]), most) if corrects else 1.0
        tokens, gradient = sum(map(sum, groups)), 0.0
        for row in groups:
            rewards = [-abs(length - 4) / 4 for length in row]
            for reward, length in zip(rewards, row, strict=True):
                gradient -= weight * (reward - (sum(rewards) - reward) / (N - 1)) * length / tokens
        w.append(w[-1] - LR * gradient)
    return w[1:]


def test_a_step_ahead_trains_on_tokens_one_update_old_with_truncated_importance_weights(tmp_path: Path) -> None:
    watch = run_fakes(tmp_path / "run", ahead=1)
    ages = [0, *[1] * (STEPS - 1)]
    expected = by_hand(watch.lengths, ages)
    assert list(watch.w.values()) == pytest.approx(expected, rel=1e-4)
    assert by_hand(watch.lengths, ages, corrects=False) != pytest.approx(expected, rel=1e-2), "weights matter here"
    for name in ("rollout/staleness", "rollout/staleness_oldest", "rollout/staleness_newest", "rollout/staleness_max"):
        assert metrics(tmp_path / "run", name) == ages
    assert metrics(tmp_path / "run", "rollout/span") == [0] * STEPS
    assert metrics(tmp_path / "run", "actor/ratio") == pytest.approx([1.0] * STEPS), (
        "to the weights that begin to train"
    )


def test_sampling_and_training_overlap(tmp_path: Path) -> None:
    """Sampling takes 1.2 s at the most and training 1 s: 2.2 s in turn, 1.2 s side by side."""
    in_turn, ahead = (run_fakes(tmp_path / str(k), ahead=k) for k in (0, 1))
    assert metrics(tmp_path / "0", "time/step")[1:-1] == pytest.approx([2.2] * (STEPS - 2))
    assert metrics(tmp_path / "1", "time/step")[1:-1] == pytest.approx([1.2] * (STEPS - 2))
    assert metrics(tmp_path / "1", "time/wait")[1:-1] == pytest.approx([0.2] * (STEPS - 2))
    assert in_turn.seconds == pytest.approx(2.2 * STEPS)  # type: ignore[attr-defined]
    assert ahead.seconds == pytest.approx(1.2 * STEPS + 1.0)  # type: ignore[attr-defined]
    assert in_turn.uids == ahead.uids


def test_evaluations_change_nothing_of_what_is_sampled_ahead(tmp_path: Path) -> None:
    """Steps sampled ahead are those of a run without evaluations."""
    plain = run_fakes(tmp_path / "plain", ahead=2)
    watch = run_fakes(tmp_path / "run", ahead=2, evaluator="heldout", eval_every=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluation-metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert watch.uids == plain.uids
    assert max(metrics(tmp_path / "run", "rollout/staleness_max")) <= 2


def test_with_correction_off_ratios_are_to_the_weights_that_sampled(tmp_path: Path) -> None:
    watch = run_fakes(tmp_path / "run", ahead=1, stale={"correct": "off"})
    w = [0.0, *watch.w.values()]
    expected = [1.0, *(math.exp(w[s - 1] - w[s - 2]) for s in range(2, STEPS + 1))]
    assert metrics(tmp_path / "run", "actor/ratio") == pytest.approx(expected, rel=1e-4)
    assert expected[1] != pytest.approx(1.0, rel=1e-2)


def test_a_bound_below_what_is_asked_for_lets_sampling_wait(tmp_path: Path) -> None:
    run_fakes(tmp_path / "run", generation=0.01, ahead=3)
    assert max(metrics(tmp_path / "run", "rollout/staleness_max")) > 1
    run_fakes(tmp_path / "bound", generation=0.01, ahead=3, stale={"most": 1})
    assert max(metrics(tmp_path / "bound", "rollout/staleness_max")) == 1


def test_completions_that_are_too_old_are_dropped_and_their_prompts_sampled_again(tmp_path: Path) -> None:
    plain = run_fakes(tmp_path / "plain", generation=0.01, ahead=3)
    watch = run_fakes(tmp_path / "run", generation=0.01, ahead=3, stale={"most": 1, "policy": "drop"})
    dropped = metrics(tmp_path / "run", "rollout/dropped")
    assert 0 < sum(dropped) < STEPS
    for again, age in zip(dropped, metrics(tmp_path / "run", "rollout/staleness_max"), strict=True):
        assert age == 0 if again else age <= 1
    assert watch.uids == plain.uids, "no prompt is lost"


def test_tokens_that_are_too_old_are_masked(tmp_path: Path) -> None:
    plain = run_fakes(tmp_path / "plain", generation=0.01, ahead=3)
    ages = metrics(tmp_path / "plain", "rollout/staleness_max")
    watch = run_fakes(tmp_path / "run", generation=0.01, ahead=3, stale={"most": 1, "policy": "mask"})
    masked = metrics(tmp_path / "run", "rollout/masked")
    assert masked == [float(age > 1) for age in ages]
    assert 0 < sum(masked) < STEPS
    w = [0.0, *watch.w.values()]
    for step, share in enumerate(masked, start=1):
        tokens = sum(map(sum, plain.lengths[step]))
        assert watch.masked[step] == share * tokens
        assert (w[step] == w[step - 1]) == bool(share), "a step without tokens changes nothing"


@pytest.mark.parametrize("place", ["ready", "update", "end"])
@pytest.mark.parametrize("step", [1, 2, 4, STEPS])
def test_whoever_is_killed_and_resumed_trains_on_every_uid_once(tmp_path: Path, place: str, step: int) -> None:
    straight = run_fakes(tmp_path / "straight", ahead=2)
    options: dict[str, Any] = {"ahead": 2, "save_every": 1}
    killed = Watch((place, step))
    with pytest.raises(KeyboardInterrupt):
        run_fakes(tmp_path / "run", killed, **options)
    resumed = run_fakes(tmp_path / "run", resume="auto", **options)
    first = min(resumed.uids, default=STEPS + 1)
    kept = {number: uids for number, uids in killed.uids.items() if number < first}
    assert {**kept, **resumed.uids} == straight.uids
    flat = [uid for uids in straight.uids.values() for uid in uids]
    assert len(set(flat)) == len(flat) == P * STEPS
    assert [row["step"] for row in records(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_the_record_tells_which_weights_sampled_what(tmp_path: Path) -> None:
    watch = run_fakes(tmp_path / "run", ahead=1)
    for row in records(tmp_path / "run"):
        step, age = row["step"], min(1, row["step"] - 1)
        assert row["after"] == [step - 1 - age]
        assert row["versions"] == {"actor": {str(step - 1 - age): sum(map(sum, watch.lengths[step]))}}
        assert row["uids"] == {"actor": watch.uids[step]}
        assert row["trained"] == {"actor": step - 1}


def test_a_replay_repeats_the_numbers_of_a_run_whose_engine_had_other_times(tmp_path: Path) -> None:
    """The recorded engine is fast and gets far ahead; the replayed one is slow, and would not by itself."""
    fast = run_fakes(tmp_path / "fast", generation=0.01, ahead=3)
    slow = run_fakes(tmp_path / "slow", generation=1.0, ahead=3)
    replay = str(tmp_path / "fast" / "iterations.jsonl")
    again = run_fakes(tmp_path / "again", generation=1.0, ahead=3, replay=replay)
    assert again.w == fast.w != slow.w
    assert [row["after"] for row in records(tmp_path / "again")] == [row["after"] for row in records(tmp_path / "fast")]
    back = run_fakes(tmp_path / "back", generation=0.01, ahead=3, replay=str(tmp_path / "slow" / "iterations.jsonl"))
    assert back.w == slow.w


def test_a_replay_that_cannot_be_followed_ends_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"step": 1, "after": [0]}\n{"step": 2, "after": [5]}\n')
    with pytest.raises(UsageError, match="step 2 waits for weights that never arrive"):
        run_fakes(tmp_path / "run", ahead=1, replay=str(path))


def test_an_engine_that_takes_no_weights_breaks_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = FakeEngine.sync
    monkeypatch.setattr(FakeEngine, "sync", lambda self, role: {} if self.w is not None else take(self, role))
    with pytest.raises(ContractError, match="2 updates old, but this run allows at most 1"):
        run_fakes(tmp_path / "run", ahead=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("grpo --ahead 1", "is not possible: the rollout engine 'hf' samples from the weights that are trained"),
        ("grpo --stale.most 3", "applies only to sampling ahead; pass --ahead 1"),
        ("grpo --stale.policy drop", "applies only to sampling ahead; pass --ahead 1"),
        ("grpo --rollout fake --ahead 2 --minibatches 2 --stale.most 1", "less than the 2 optimizer updates of a step"),
        ("grpo --rollout fake --ahead 2 --stale.policy mask", "has no effect: tokens are at most 2 updates old"),
        ("grpo --rollout fake --ahead 1 --replay nowhere.jsonl", "nowhere.jsonl: No such file or directory"),
        ("dapo --rollout fake --ahead 2 --stale.most 1 --stale.policy drop", "a filter replaces prompts"),
    ],
)
def test_what_cannot_sample_ahead_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    line = f"{words} --model tiny --strategy fake --reward length --output {tmp_path / 'run'}"
    assert main(line.split()) == 2
    assert told in capsys.readouterr().err
