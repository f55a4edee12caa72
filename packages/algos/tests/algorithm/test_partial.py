"""Completions that go on under new weights: versions per token, surplus that is kept, stragglers, and kills.

Whole runs on the rollout `fake` and the strategy `fake` in simulated time. `planted` is the fake engine with a slow prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import Registry, Run, hookimpl, make_config
from rlhf_core.cli import main
from rlhf_core.util.clock import simulated_time

STEPS, N, P = 8, 2, 4


class Watch:
    """Records of each step's training rows; may end the run by an exception."""

    def __init__(self, fail_at: int = 0) -> None:
        self.fail_at = fail_at
        self.uids: dict[int, list[int]] = {}
        self.rows: dict[int, list[tuple[list[int], list[float], list[float]]]] = {}
        """per step and completion: versions, tokens modulo 7, and log-probabilities of the engine"""
        self.w: list[float] = [0.0]

    @hookimpl
    def rlhf_before_update(self, run: Run) -> None:
        if run.step + 1 == self.fail_at:
            raise KeyboardInterrupt("killed")

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        (batch,) = run.samples.values()
        self.uids[step] = list(dict.fromkeys(batch["uids_N"].tolist()))
        self.rows[step] = [
            (
                batch["versions_NT"][i, :length].tolist(),
                (batch.tokens_NT[i, :length] % 7).tolist(),
                batch["sampler_logprobs_NT"][i, :length].tolist(),
            )
            for i, length in enumerate(batch.lengths_N.tolist())
        ]
        self.w.append(float(run.roles["actor"].trainable.w.detach()))  # type: ignore[attr-defined]


def run_partial(output: Path, watch: Watch | None = None, **options: Any) -> Watch:
    """A run of GRPO on the fakes: slices of 4 tokens, 0.1 s each token, and 1 s per update."""
    registry, watch = Registry(), watch or Watch()
    registry.register(watch, name="watch")
    chosen: dict[str, Any] = {
        "rollout": {"use": "fake", "token_seconds": 0.1},
        "partial": {"tokens": 4, "surplus": 2},
        "ahead": 1,
        "steps": STEPS,
        **options,
    }
    config = make_config(
        {"use": "grpo", "kl": {"coef": 0.0}},
        model="tiny",
        strategy={"use": "fake", "step_seconds": 1.0},
        advantage="rloo",
        loss="dapo",
        reward={"use": "length", "target": 4},
        sampling={"n": N, "max_new_tokens": 40},
        actor={"optim": {"lr": 0.5}},
        batch_size=P,
        output=str(output),
        **chosen,
    )
    with simulated_time():
        Run(config, registry).train()
    return watch


def metrics(output: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_token_carries_the_version_that_sampled_it(tmp_path: Path) -> None:
    """The engine's log-probability is -(1 + token mod 7) + w of the weights that sampled: it tells the version by itself."""
    watch = run_partial(tmp_path / "run")
    spans = set[int]()
    for step, rows in watch.rows.items():
        for versions, letters, logprobs in rows:
            expected = [watch.w[version] - 1 - letter for version, letter in zip(versions, letters, strict=True)]
            assert logprobs == pytest.approx(expected, abs=1e-5)
            assert versions == sorted(versions)
            assert step - 1 - versions[0] <= 2, "the bound is one step more than --ahead"
            spans.add(versions[-1] - versions[0])
    assert len(set(watch.w)) == STEPS + 1, "each version has a number of its own"
    assert max(spans) >= 1, "some completion was sampled by two versions"
    assert max(metrics(tmp_path / "run", "rollout/span")) > 0


def test_a_step_trains_on_as_many_prompts_as_it_should_and_none_twice(tmp_path: Path) -> None:
    watch = run_partial(tmp_path / "run")
    assert [len(uids) for uids in watch.uids.values()] == [P] * STEPS
    trained = [uid for uids in watch.uids.values() for uid in uids]
    assert len(set(trained)) == len(trained)
    assert max(metrics(tmp_path / "run", "rollout/carried")) > 0
    order = drawn_order(tmp_path)
    assert set(order[: P * STEPS - P]) <= set(trained) <= set(order[: P * STEPS + 2]), (
        "a surplus of 2 prompts is in progress"
    )


def drawn_order(tmp_path: Path) -> list[int]:
    """The uids of rows in the order of drawing: those of a run in turn."""
    watch = run_partial(tmp_path / "in-turn", ahead=0, partial={}, steps=STEPS + 2)
    return [uid for uids in watch.uids.values() for uid in uids]


@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_whoever_is_killed_and_resumed_loses_and_doubles_no_prompt(tmp_path: Path, step: int) -> None:
    killed = Watch(fail_at=step)
    with pytest.raises(KeyboardInterrupt):
        run_partial(tmp_path / "run", killed, save_every=1)
    resumed = run_partial(tmp_path / "run", save_every=1, resume="auto")
    assert sorted({**killed.uids, **resumed.uids}) == list(range(1, STEPS + 1))
    trained = [uid for uids in ({**killed.uids, **resumed.uids}).values() for uid in uids]
    assert len(set(trained)) == len(trained) == P * STEPS
    order = drawn_order(tmp_path)
    assert set(order[: P * STEPS - P]) <= set(trained) <= set(order[: P * STEPS + 2])


STRAGGLER = {"use": "rlhf_core.testing.straggler:Straggler", "token_seconds": 0.1, "slow_row": 20}
"""Completions of 4 tokens, 0.4 s; those of one prompt have 40."""


def test_a_straggler_of_ten_times_the_length_holds_no_step_up(tmp_path: Path) -> None:
    """Whole completions: its step takes 4 s in place of the 1 s of an update. In slices it goes on beside nine other steps."""
    options: dict[str, Any] = {"rollout": STRAGGLER, "steps": 30}
    run_partial(tmp_path / "whole", partial={}, **options)
    watch = run_partial(tmp_path / "slices", partial={"tokens": 4, "surplus": 1}, stale={"most": 12}, **options)
    assert max(metrics(tmp_path / "whole", "time/step")[1:]) > 3.0
    assert max(metrics(tmp_path / "slices", "time/step")[1:]) <= 1.3
    spans = [versions[-1] - versions[0] for rows in watch.rows.values() for versions, _, _ in rows]
    assert sorted(spans)[-N:] == [9] * N, "ten slices by ten versions"
    assert sorted(spans)[: -2 * N] == [0] * (len(spans) - 2 * N)


def test_a_bound_on_age_makes_a_step_wait_for_the_straggler(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rollout": STRAGGLER,
        "steps": 30,
        "partial": {"tokens": 4, "surplus": 1},
        "stale": {"most": 3},
    }
    run_partial(tmp_path / "run", **options)
    assert max(metrics(tmp_path / "run", "rollout/staleness_max")) == 3
    assert max(metrics(tmp_path / "run", "time/step")[1:]) > 1.3


def test_at_its_deadline_a_step_trains_on_what_is_complete(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rollout": STRAGGLER, "steps": 30, "stale": {"most": 12}}
    watch = run_partial(tmp_path / "run", partial={"tokens": 4, "seconds": 0.1}, **options)
    sizes = [len(uids) for uids in watch.uids.values()]
    assert min(sizes) == P - 1
    assert max(metrics(tmp_path / "run", "time/step")[1:]) <= 1.3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--partial.tokens 8", "needs sampling ahead; pass --ahead 1 too"),
        ("--partial.surplus 2", "needs slices; pass --partial.tokens 256 too"),
        ("--ahead 1 --partial.tokens 8 --sampling.stop end", "leave out --sampling.stop"),
        ("--ahead 1 --partial.tokens 8 --stale.most 1", "needs a bound of at least 2 updates"),
        ("--ahead 1 --partial.tokens 8 --partial.surplus 17", "more than the 16 prompts of a step"),
        ("--ahead 1 --partial.tokens 8 --filter varied", "leave out --filter"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    line = f"grpo {words} --rollout fake --model tiny --strategy fake --reward length --output {tmp_path / 'run'}"
    assert main(line.split()) == 2
    assert told in capsys.readouterr().err
