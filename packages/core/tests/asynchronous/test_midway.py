"""Weights that arrive in the middle of a call of the engine (`--partial.midway`), on the fakes in simulated time, by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core import Registry, Run, hookimpl
from rlhf_core.asynchronous.gate import EngineGate
from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.options import Sampling
from rlhf_core.errors import UsageError
from rlhf_core.launcher.local import Local
from rlhf_core.rollout.fake import FakeEngine, FakeRollout
from rlhf_core.run.collecting import check_ahead
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.testing.tiny_environment import TinyEnvironment
from rlhf_core.util.clock import current_time, simulated_time, sleep, start

TOKEN = 0.125  # seconds of a decoding step; sums of it are exact
LENGTH = 16


@dataclass
class Number:
    """A role whose weights are one number."""

    w: float
    version: int

    def weights(self) -> Iterator[tuple[str, float]]:
        yield "w", self.w


class Between(FakeRollout):
    """An engine that takes weights between two calls only."""

    takes_weights_midway = False


class Apart(Local):
    """A launcher whose engines are in processes that it calls one call at a time."""

    engines_apart = True


class Midway(Apart):
    """One that reaches them in the middle of a call."""

    brings_weights_midway = True


class Watch:
    """Versions, token numbers and log-probabilities of all trained completions, and the number after each step."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int, int, float]] = []
        """(step, version, token, log-probability)"""
        self.w = [0.0]

    @hookimpl
    def rlhf_step_end(self, run: Run, step: int) -> None:
        (batch,) = run.samples.values()
        names = ("versions_NT", "sampler_logprobs_NT")
        versions, logprobs = (batch[name][batch.mask_NT].tolist() for name in names)
        tokens = batch.tokens_NT[batch.mask_NT].tolist()
        self.tokens += zip([step] * len(tokens), versions, tokens, logprobs, strict=True)
        self.w.append(float(run.roles["actor"].trainable.w.detach()))  # type: ignore[attr-defined]


def train(output: Path, **options: Any) -> tuple[Watch, float]:
    """A run on the fakes, 0.3 s per update and up to 2 s of sampling per step; the seconds that it took."""
    registry, watch = Registry(), Watch()
    registry.register(watch, name="watch")
    chosen = {
        "rollout": FakeRollout(token_seconds=TOKEN, sync_seconds=0.01),
        "strategy": {"use": "fake", "step_seconds": 0.3},
        "sampling": {"n": 4, "max_new_tokens": LENGTH},
        "reward": {"use": "length", "target": 4},
        "actor": {"optim": {"lr": 0.5}},
        "ahead": 2,
        "steps": 8,
        "batch_size": 2,
        **options,
    }
    with simulated_time():
        tiny_run(output, registry=registry, **chosen).train()
        return watch, current_time()


def column(output: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("arrival", "old"), [(0.0625, 1), (0.25, 2), (0.3125, 3), (0.4375, 4)])
def test_each_token_has_the_weights_that_its_step_began_with(arrival: float, old: int) -> None:
    """Step t begins after t * 0.125 s of sampling; the pause of 1 s makes the call 1 s longer."""
    before, after = Number(0.25, 3), Number(-2.0, 4)
    engine = FakeEngine(FakeRollout(token_seconds=TOKEN, sync_seconds=1.0))
    prompts = Prompts(["a"], [[1]], [Example("a")], uids=[5])
    answered: list[tuple[Rollouts, float]] = []

    def sample() -> None:
        answered.append((engine(before, prompts, Sampling(n=8, max_new_tokens=LENGTH)), current_time()))  # type: ignore[arg-type]

    with simulated_time():
        engine.sync(before)  # type: ignore[arg-type]
        assert current_time() == 1.0
        start(sample, "sampler")
        sleep(arrival)
        engine.sync(after)  # type: ignore[arg-type]
        sleep(60.0)
    ((rollouts, end),) = answered
    assert end == 1.0 + TOKEN * int(rollouts.lengths_N.max()) + 1.0
    assert int(rollouts.lengths_N.max()) > 4
    for i, length in enumerate(rollouts.lengths_N.tolist()):
        expected = [(3, 0.25) if t < old else (4, -2.0) for t in range(length)]
        assert rollouts["versions_NT"][i, :length].tolist() == [version for version, _ in expected]
        letters = rollouts.tokens_NT[i, :length].tolist()
        logprobs = [w - 1 - token % 7 for (_, w), token in zip(expected, letters, strict=True)]
        assert rollouts["sampler_logprobs_NT"][i, :length].tolist() == logprobs
    engine.sync(before)  # type: ignore[arg-type]
    later = engine(before, prompts, Sampling(n=2, max_new_tokens=LENGTH))  # type: ignore[arg-type]
    assert set(later["versions_NT"][later.mask_NT].tolist()) == {3}, "nothing is left of the call before"


def test_weights_do_not_wait_for_a_call_and_the_next_call_waits_for_them() -> None:
    """The sampler calls at 0 s and, after 10 s, once the weights that come from 5 s to 12 s are there."""
    gate, calls = EngineGate(), list[tuple[float, int]]()

    def sampler() -> None:
        for _ in range(2):
            with gate.sampling() as trained:
                calls.append((current_time(), trained))
                sleep(10.0)

    with simulated_time():
        start(sampler, "sampler")
        sleep(5.0)
        with gate.weights(1, midway=True):
            assert current_time() == 5.0
            sleep(7.0)
        sleep(100.0)
    assert calls == [(0.0, 0), (12.0, 1)]


def test_a_run_trains_on_completions_of_several_versions_and_waits_less(tmp_path: Path) -> None:
    watch, seconds = train(tmp_path / "midway", partial={"midway": True})
    between, longer = train(tmp_path / "between")
    for step, version, token, logprob in watch.tokens:
        assert logprob == pytest.approx(watch.w[version] - 1 - token % 7, abs=1e-5)
        assert step - 1 - 2 <= version <= step - 1, "a token is at most two updates old, and never newer than the role"
    assert len(set(watch.w)) > 4, "weights change"
    mixed = sum(span > 0 for span in column(tmp_path / "midway", "rollout/span"))
    assert mixed >= 3, "weights came in the middle of completions"
    assert not any(column(tmp_path / "between", "rollout/span"))
    assert [row[2] for row in between.tokens] == [row[2] for row in watch.tokens], "completions follow from their seeds"
    ages = [sum(column(tmp_path / name, "rollout/staleness")) for name in ("midway", "between")]
    assert ages[0] < ages[1], "tokens are newer"
    assert seconds <= longer


def test_an_engine_that_takes_weights_between_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"partial\.midway.* not supported by rollout engines of kind '.*Between'"):
        train(tmp_path / "run", rollout=Between(token_seconds=TOKEN), partial={"midway": True})


def test_an_engine_of_a_launcher_with_engines_apart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not supported by rollout engines under launcher=.*Apart.*; leave it out$"):
        train(tmp_path / "run", launcher=Apart(), partial={"midway": True})


def test_an_engine_of_a_launcher_that_brings_weights_midway_still_has_to_take_them(tmp_path: Path) -> None:
    check_ahead(tiny_run(tmp_path / "run", launcher=Midway(), ahead=1, partial={"midway": True}).plan)
    with pytest.raises(
        UsageError, match=r"not supported by rollout engines of kind '.*Between' with these options, which"
    ):
        train(tmp_path / "run", launcher=Midway(), rollout=Between(), partial={"midway": True})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ahead": 0}, r"needs sampling ahead; pass .*ahead"),
        ({"replay": "iterations.jsonl"}, r"no replay repeats; leave out .*replay"),
    ],
)
def test_a_run_without_a_thread_for_them_is_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        train(tmp_path / "run", partial={"midway": True}, **options)


def test_episodes_take_weights_between_and_inside_of_their_turns(tmp_path: Path) -> None:
    options: dict[str, Any] = {"environment": TinyEnvironment(), "episode": {"turn_tokens": 6}}
    watch, _ = train(tmp_path / "run", partial={"midway": True}, **options)
    assert max(column(tmp_path / "run", "rollout/span")) > 0
    for step, version, token, logprob in watch.tokens:
        assert logprob == pytest.approx(watch.w[version] - 1 - token % 7, abs=1e-5)
        assert step - 1 - 2 <= version <= step - 1


def test_slices_and_weights_midway_go_together(tmp_path: Path) -> None:
    watch, _ = train(tmp_path / "run", partial={"midway": True, "tokens": 6, "surplus": 1}, steps=6)
    versions = [version for _, version, _, _ in watch.tokens]
    assert len(set(versions)) > 3
    for _, version, token, logprob in watch.tokens:
        assert torch.isclose(torch.tensor(logprob), torch.tensor(watch.w[version] - 1 - token % 7), atol=1e-5)
